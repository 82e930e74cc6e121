"""Decoding by a CUDA graph, on the CPU: the same steps against a decoder without, and what a graph would demand.

That CUDA captures and replays the steps is not tested: it takes a GPU.
"""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.device import standin
from vz_edge.bundle import read_manifest
from vz_edge.device.backend import OnnxBackend, choose_backend
from vz_edge.device.cuda_graph import GraphDecoder
from vz_edge.device.model import EdgeModel
from vz_edge.device.onnx_decoder import OnnxDecoder, open_decoder_session
from vz_edge.device.options import AskOptions
from vz_edge.device.runtime import CPU, CUDA
from vz_edge.errors import InsufficientMemoryError, ProviderError, RequestError

CAPACITY = 40
EMBEDS = np.random.default_rng(0).standard_normal((CAPACITY, standin.HIDDEN)).astype(np.float32)
PICTURE = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
BINDERS = ("bind_input", "bind_cpu_input", "bind_ortvalue_input", "bind_output", "bind_ortvalue_output")


class CapturingSession:
    """A session that holds its caller to what a captured graph demands, and records each run's graph.

    The first run of a graph runs three times, as in ONNX Runtime (two before the capture, one replay after it); from
    then on the graph has that binding, and nothing may be bound to it.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.graphs: list[int] = []
        self.captured: onnxruntime.IOBinding | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self.session, name)

    def run_with_iobinding(self, binding: onnxruntime.IOBinding, options: onnxruntime.RunOptions) -> None:
        graph = int(options.get_run_config_entry("gpu_graph_id"))
        self.graphs.append(graph)
        if graph != -1 and self.captured is None:
            self.captured = binding
            for name in BINDERS:
                setattr(binding, name, lambda *_: pytest.fail("a captured graph was bound anew"))
            self.session.run_with_iobinding(binding, options)
            self.session.run_with_iobinding(binding, options)
        assert (binding is self.captured) == (graph != -1)
        self.session.run_with_iobinding(binding, options)


@pytest.fixture
def session(bundle: Path) -> CapturingSession:
    return CapturingSession(open_decoder_session(bundle, [CPU], threads=1))


@pytest.fixture
def decoder(session: CapturingSession) -> GraphDecoder:
    return GraphDecoder(session, CAPACITY)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def both(bundle: Path) -> tuple[GraphDecoder, OnnxDecoder]:
    session = open_decoder_session(bundle, [CPU], threads=1)
    return GraphDecoder(session, CAPACITY), OnnxDecoder(session)


@given(course=st.lists(st.integers(-8, 3).filter(bool), min_size=1, max_size=20), capacity=st.integers(8, CAPACITY))
def test_any_course_gives_the_logits_of_a_decoder_without(
    both: tuple[GraphDecoder, OnnxDecoder], course: list[int], capacity: int
) -> None:
    """Numbers above 0 are tokens to read, those below tokens to forget."""
    contexts = [decoder.start(capacity) for decoder in both]
    for count in course:
        length = contexts[0].length
        if count < 0:
            for context in contexts:
                context.rewind(max(0, length + count))
        elif length + count <= capacity:
            found, expected = (context.append(EMBEDS[length : length + count]) for context in contexts)
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_tokens_that_come_alone_are_read_by_one_graph(decoder: GraphDecoder, session: CapturingSession) -> None:
    for _ in range(2):
        context = decoder.start(CAPACITY - 8)
        for count in (5, 1, 1, 3, 1):
            context.append(EMBEDS[context.length : context.length + count])
        del context
    assert session.graphs == [-1, 1, 1, -1, 1] * 2


def test_another_context_decodes_without_until_the_graph_is_free(
    decoder: GraphDecoder, session: CapturingSession
) -> None:
    first = decoder.start(20)
    for other in (decoder.start(20), first.fork()):
        other.append(EMBEDS[:1])
    assert session.graphs == [-1, -1]
    first.append(EMBEDS[:1])
    assert session.graphs == [-1, -1, 1]
    del first
    last = decoder.start(20)
    last.append(EMBEDS[:1])
    assert session.graphs == [-1, -1, 1, 1]


def test_a_context_larger_than_the_graphs_decodes_without(decoder: GraphDecoder, session: CapturingSession) -> None:
    decoder.start(CAPACITY + 1).append(EMBEDS[:1])
    assert session.graphs == [-1]


def test_a_second_thread_is_refused_and_changes_nothing(decoder: GraphDecoder, session: CapturingSession) -> None:
    with_graph, without = decoder.start(20), decoder.start(20)
    with_graph.append(EMBEDS[:3])
    refused: list[str] = []

    def ask() -> None:
        for context, count in ((with_graph, 1), (with_graph, 2), (without, 1)):
            with pytest.raises(RequestError) as caught:
                context.append(EMBEDS[3 : 3 + count])
            refused.append(str(caught.value))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert len(refused) == 3 and all("cuda_graph" in message and "\n" not in message for message in refused)
    assert (with_graph.length, without.length) == (3, 0)
    found = with_graph.append(EMBEDS[3:4])
    np.testing.assert_allclose(found, OnnxDecoder(session.session).start(20).append(EMBEDS[:4]), atol=1e-5)


def test_a_forgotten_decoder_is_freed_at_once(bundle: Path) -> None:
    decoder = GraphDecoder(open_decoder_session(bundle, [CPU], threads=1), CAPACITY)
    decoder.start(20).append(EMBEDS[:1])
    forgotten = weakref.ref(decoder)
    gc.disable()
    try:
        del decoder
        assert forgotten() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_model_answers_as_without(tmp_path: Path, target: str) -> None:
    standin.write_bundle(tmp_path / "bundle", target=target)
    model = EdgeModel.load(tmp_path / "bundle", providers=["cpu"], threads=1)
    session = CapturingSession(open_decoder_session(tmp_path / "bundle", [CPU], threads=1))
    decoder = GraphDecoder(session, model.context_length)  # type: ignore[arg-type]
    parts = (model.manifest, model.vision, model.chat, model.embedding)
    graph = EdgeModel(*parts, decoder, model.context_length, load_sec=0.0)
    assert _answers(graph) == _answers(model)
    assert session.graphs.count(1) > session.graphs.count(-1)


def _answers(model: EdgeModel) -> list[tuple[int, ...]]:
    options: AskOptions = {"max_new_tokens": 8}
    replies = [model.ask(PICTURE, "What is this?", **options), *model.ask_many(PICTURE, ["Why?", "Where?"], **options)]
    conversation = model.session()
    conversation.look(PICTURE)
    replies += [conversation.ask(question, keep=True, **options) for question in ("Who?", "When?")]
    return [reply.token_ids for reply in replies]


def test_cuda_is_asked_to_capture_the_decoder_and_not_vision(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, dict] = {}

    def record(path: Path, options: object, providers: list[str], provider_options: list[dict]) -> None:
        opened[path.name] = dict(zip(providers, provider_options, strict=True))
        raise RuntimeError("This session cannot use the graph capture feature as requested by the user")

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    backend = OnnxBackend((CUDA, CPU), graph_tokens=64)
    with pytest.raises(ProviderError, match="without cuda_graph"):
        backend.open(bundle, threads=1)
    with pytest.raises(ProviderError):
        backend.open_vision(bundle, read_manifest(bundle), threads=1)
    captured = {file: options[CUDA].get("enable_cuda_graph") for file, options in opened.items()}
    assert captured == {"decoder.onnx": "1", "vision.onnx": None}


def test_where_there_are_no_cuda_graphs_they_are_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(ProviderError, match="leave cuda_graph out"):
        EdgeModel.load(bundle, cuda_graph=True)  # it was exported for the CPU
    in_torch = dataclasses.replace(read_manifest(bundle), format="bnb")
    with pytest.raises(RequestError, match="leave cuda_graph out"):
        choose_backend(bundle, in_torch, ["cuda"], "onnx", graph_tokens=64)
    assert choose_backend(bundle, read_manifest(bundle), ["cuda"], "onnx", 64) == OnnxBackend((CUDA,), 64)


def test_the_graphs_cache_counts_before_anything_is_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = dataclasses.replace(read_manifest(bundle), predicted={"kv_cache_bytes_per_token": 1_000_000})
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr("vz_edge.device.model.read_manifest", lambda folder: manifest)
    monkeypatch.setattr("vz_edge.device.model.available_memory_bytes", lambda provider: 10_000_000)
    with pytest.raises(InsufficientMemoryError, match=r"KV cache 0\.06 GB"):
        EdgeModel.load(bundle, providers="cuda", cuda_graph=True, max_context=64)
