"""Providers are chosen as asked or refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime
import pytest

from vz_edge.device import runtime
from vz_edge.device.runtime import (
    CPU,
    CUDA,
    WEIGHTS_OUT_OF_ARENA,
    choose_providers,
    open_session,
    physical_cores,
    provider_options,
    session_options,
)
from vz_edge.errors import CorruptBundleError, DependencyError, ProviderError, RequestError


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])


@pytest.mark.usefixtures("with_cuda")
def test_the_target_decides_where_there_is_a_choice() -> None:
    assert choose_providers(None, "cuda") == [CUDA, CPU]
    assert choose_providers(None, "cpu") == [CPU]
    assert choose_providers(["cuda"], "cpu") == [CUDA]
    assert choose_providers("CPU", "cuda") == [CPU]
    assert choose_providers([CUDA, "cpu"], "cpu") == [CUDA, CPU]


@pytest.mark.usefixtures("without_cuda")
def test_what_is_not_there_is_refused_with_what_is() -> None:
    assert choose_providers(None, "cuda") == [CPU]
    for wrong in (["cuda"], ["tensorrt", "cpu"], []):
        with pytest.raises(ProviderError, match="there are: cpu"):
            choose_providers(wrong, "cuda")


ON_SECOND = (CUDA, {"device_id": "1"})


def test_a_provider_may_have_options_as_onnxruntime_takes_them(with_cuda: None) -> None:
    assert choose_providers([("cuda", {"device_id": 1}), "cpu"], "cpu") == [ON_SECOND, CPU]
    assert choose_providers(("cuda", {"device_id": "1"}), "cpu") == [ON_SECOND]
    assert choose_providers([["cuda", {}]], "cpu") == [CUDA]
    for wrong in (5, [5], {"cuda": {}}, [("cuda",)], [("cuda", 1)], [(1, {})], b"cuda", [None], ("cuda", {"a": []})):
        with pytest.raises(ProviderError, match="expected"):
            choose_providers(wrong, "cpu")  # type: ignore[arg-type]
    for number in (-1, "x", True, 1.5):
        with pytest.raises(ProviderError, match=r"device_id .*; expected a whole number"):
            choose_providers([("cuda", {"device_id": number})], "cpu")


def test_a_device_is_a_number_of_each_provider_that_has_one(with_cuda: None) -> None:
    assert choose_providers(None, "cuda", device=1) == [ON_SECOND, CPU]
    assert choose_providers([("cuda", {"device_id": 1}), "cpu"], "cpu", device=1) == [ON_SECOND, CPU]
    assert choose_providers(("cuda", {"gpu_mem_limit": 5}), "cpu", 0) == [
        (CUDA, {"gpu_mem_limit": "5", "device_id": "0"})
    ]
    with pytest.raises(ProviderError, match="device 1 and device_id 0 of CUDAExecutionProvider were both given"):
        choose_providers([("cuda", {"device_id": 0})], "cpu", device=1)
    with pytest.raises(ProviderError, match="CPUExecutionProvider runs on none; leave device out"):
        choose_providers(None, "cpu", device=0)
    for wrong in ("1", True, -1, 1.0):
        with pytest.raises(RequestError, match=r"device .* is impossible; expected a whole number from 0"):
            choose_providers(None, "cuda", device=wrong)  # type: ignore[arg-type]


class StartedSession:
    """What is left of a session whose provider started on a GPU, the first by default."""

    def __init__(self, *_: object, providers: list[str], provider_options: list[dict[str, str]], **__: object) -> None:
        self.names, self.options = providers, provider_options

    def get_providers(self) -> list[str]:
        return self.names

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {name: {"device_id": "0", **given} for name, given in zip(self.names, self.options, strict=True)}


def test_a_session_is_on_the_device_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", StartedSession)
    monkeypatch.setattr(runtime, "preload_cuda", lambda ort: None)
    session = open_session(tmp_path, [ON_SECOND, CPU], threads=1, cuda_graph=True)
    assert session.options[0] | {"device_id": "1", "enable_cuda_graph": "1"} == session.options[0]
    assert session.options[1] == {}
    own = open_session(tmp_path, [(CUDA, {"arena_extend_strategy": "kNextPowerOfTwo"})], threads=1)
    assert own.options[0]["arena_extend_strategy"] == "kNextPowerOfTwo"
    # onnxruntime's own way out where a provider does not start: once more, without its options
    monkeypatch.setattr(StartedSession, "get_provider_options", lambda self: {CUDA: {"device_id": "0"}})
    with pytest.raises(ProviderError, match="did not start on device 1"):
        open_session(tmp_path, [ON_SECOND, CPU], threads=1)


def test_an_option_that_a_provider_refuses_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Unknown provider option: colour")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    monkeypatch.setattr(runtime, "preload_cuda", lambda ort: None)
    with pytest.raises(ProviderError, match=r"does not start with colour=red \(Unknown provider option"):
        open_session(tmp_path, [(CUDA, {"colour": "red"})], threads=1)


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="CUDA may start here")
def test_a_provider_that_does_not_start_is_refused(bundle: Path) -> None:
    with pytest.raises(ProviderError, match="did not start"), pytest.warns(UserWarning):
        open_session(bundle / "decoder.onnx", [CUDA], threads=1)


def test_weights_on_cuda_do_not_grow_the_arena() -> None:
    on_cuda, on_cpu = (session_options(providers, threads=1) for providers in ([CUDA, CPU], [CPU]))
    assert on_cuda.get_session_config_entry(WEIGHTS_OUT_OF_ARENA) == "1"
    with pytest.raises(RuntimeError):
        on_cpu.get_session_config_entry(WEIGHTS_OUT_OF_ARENA)
    cuda, cpu = provider_options([CUDA, CPU])
    assert cuda["arena_extend_strategy"] == "kSameAsRequested" and cpu == {}


def test_without_onnxruntime_the_packages_to_install_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r"pip install 'onnxruntime>=.*'onnxruntime-gpu>="):
        choose_providers(None, "cpu")


@pytest.mark.parametrize(
    "raised", ["OSError('libcudart.so.12: no such file')", "ImportError('numpy 2\\nis needed')"], ids=["OS", "import"]
)
def test_an_onnxruntime_that_does_not_import_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: str
) -> None:
    (tmp_path / "onnxruntime.py").write_text(f"raise {raised}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    message = r"needs onnxruntime, .* \((libcudart.*file|numpy 2 is needed)\); install a build of it for this machine"
    with pytest.raises(DependencyError, match=message):
        choose_providers(None, "cpu")


@pytest.mark.parametrize("content", [b"", b"not a model", None], ids=["empty", "text", "cut"])
def test_a_damaged_graph_is_a_corrupt_bundle(bundle: Path, tmp_path: Path, content: bytes | None) -> None:
    whole = (bundle / "decoder.onnx").read_bytes()
    (tmp_path / "decoder.onnx").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(CorruptBundleError, match=r"decoder\.onnx") as caught:
        open_session(tmp_path / "decoder.onnx", [CPU], threads=1)
    assert "\n" not in str(caught.value)


def test_hardware_threads_of_a_core_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 5})
    monkeypatch.setattr(runtime, "_siblings", lambda cpu: f"{cpu // 2}")
    assert physical_cores() == 3
