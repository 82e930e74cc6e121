"""Whether a machine can run a language model with bitsandbytes weights, and what a user reads where it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import make_model
from vz_edge.backends import transformers_backend
from vz_edge.backends.bitsandbytes_trial import fault
from vz_edge.backends.transformers_backend import choose_device, load_language_model, require_kernel, require_packages
from vz_edge.backends.transformers_decoder import TransformersDecoder
from vz_edge.device import dependencies
from vz_edge.device.process import Outcome
from vz_edge.errors import CorruptBundleError, DependencyError, ProviderError


def language_model(decoder: str, **text: object) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model = make_model("llava", decoder, text)  # type: ignore[arg-type]
    alone = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    alone.model.load_state_dict(model.model.language_model.state_dict())
    return alone


@pytest.mark.parametrize(
    ("decoder", "text"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 6}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    ],
    ids=["llama", "qwen2", "mistral with a window", "scaled rotation"],
)
def test_a_context_gives_the_logits_of_transformers(decoder: str, text: dict) -> None:
    model = language_model(decoder, **text)
    embeds = torch.randn(1, 20, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    context = TransformersDecoder(model).start(capacity=20)
    with torch.inference_mode():
        expected = model(inputs_embeds=embeds, use_cache=False).logits[0].numpy()
    for start, stop in ((0, 9), (9, 10), (10, 20)):
        found = context.append(embeds[0, start:stop].numpy())
        np.testing.assert_allclose(found, expected[stop - 1], atol=1e-4)
    context.rewind(9)
    np.testing.assert_allclose(context.append(embeds[0, 9:10].numpy()), expected[9], atol=1e-4)


def test_a_call_that_broke_off_leaves_the_context_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model("llama")
    embeds = np.random.default_rng(0).standard_normal((10, model.config.hidden_size)).astype(np.float32)
    context = TransformersDecoder(model).start(capacity=10)
    context.append(embeds[:6])
    layer = model.model.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            context.append(embeds[6:8])
    assert context.length == 6
    expected = TransformersDecoder(model).start(capacity=10).append(embeds)
    np.testing.assert_allclose(context.append(embeds[6:]), expected, atol=1e-4)


def test_what_is_missing_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dependencies.importlib.util, "find_spec", lambda name: None if name in ("torch", "bitsandbytes") else name
    )
    with pytest.raises(DependencyError, match=r"^running it needs torch, bitsandbytes, .*'bitsandbytes>=.*onnx"):
        require_packages("running it")


@pytest.mark.parametrize("error", [OSError("libcudart.so.12: no such file"), ImportError("needs\nnumpy 2")], ids=repr)
def test_what_does_not_import_is_named_with_the_way_round(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def import_module(name: str) -> None:
        if name == "accelerate":
            raise error

    monkeypatch.setattr(dependencies.importlib, "import_module", import_module)
    reason = " ".join(str(error).split())
    with pytest.raises(DependencyError, match=rf"^running it needs accelerate, .* \({reason}\); install a build.*onnx"):
        require_packages("running it")


def test_a_kernel_that_fails_is_named_with_the_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    died = Outcome(None, "the process ended with status 1 (named symbol not found)")
    monkeypatch.setattr(transformers_backend, "kernel_trial", lambda bits, device: died)
    with pytest.raises(ProviderError, match=r"4-bit kernel on this machine's cuda .*named symbol.*--format onnx"):
        require_kernel(4, "cuda")


def test_a_kernel_that_computes_wrongly_is_at_fault() -> None:
    right = {"loss": 0.09, "distance": 0.001}
    assert fault(Outcome(right)) is None
    for wrong in ({"loss": 0.5}, {"distance": 0.1}, {"distance": float("nan")}):
        assert "wrong numbers" in str(fault(Outcome(right | wrong)))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernels_here_are_right(bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    require_kernel(bits, "cpu")


def test_where_the_language_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (
        choose_device(None, "cuda") == choose_device(["cuda"], "cpu") == choose_device("CUDAExecutionProvider", "cpu")
    )
    assert choose_device(["cuda"], "cpu") == "cuda"
    assert choose_device(None, "cpu") == choose_device(["CPUExecutionProvider", "cuda"], "cuda") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None, "cuda") == "cpu"
    with pytest.raises(ProviderError, match="no CUDA device here"):
        choose_device(["cuda"], "cuda")
    for wrong in (["dml"], "NoSuchExecutionProvider", []):
        with pytest.raises(ProviderError, match=r"cannot run on '.*': torch runs it; take --provider cpu"):
            choose_device(wrong, "cuda")


def test_a_checkpoint_that_transformers_cannot_load_is_corrupt(tmp_path: Path) -> None:
    with pytest.raises(CorruptBundleError, match=r"cannot be loaded by transformers .*export the bundle again"):
        load_language_model(tmp_path, "cpu")
