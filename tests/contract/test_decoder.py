"""What every decoder keeps: ONNX Runtime's, transformers' (plain, NF4, LLM.int8()) and the fake one.

``graph`` is ONNX Runtime's with the steps and the memory of a CUDA graph, on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from onnxruntime import OrtValue

from tests.device import standin
from vz_edge.device.cuda_graph import GraphContext, GraphDecoder
from vz_edge.device.decoder import Decoder
from vz_edge.device.fake_decoder import FakeDecoder
from vz_edge.device.onnx_decoder import OnnxDecoder, open_decoder_session
from vz_edge.errors import ContextLengthError

CAPACITY = 24
NEEDS_BITSANDBYTES = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@dataclass(frozen=True)
class Kept:
    """A decoder, and how far two ways to the same logits may lie apart (norm of the difference over norm).

    bf16 has 8 bits, and a kernel for one row sums in another order than one for many.
    """

    decoder: Decoder
    tolerance: float

    def assert_same(self, found: np.ndarray, expected: np.ndarray) -> None:
        assert np.linalg.norm(found - expected) <= self.tolerance * np.linalg.norm(expected)

    def fresh(self, embeds: np.ndarray) -> np.ndarray:
        return self.decoder.start(len(embeds)).append(embeds)


class GraphDecoderOfADevice(GraphDecoder):
    """Allocates as on CUDA: all tensors are the runtime's, with anything in them; here they are in the CPU's memory."""

    device = property(lambda self: "cuda", lambda self, found: None)  # type: ignore[assignment]

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> OrtValue:
        return OrtValue.ortvalue_from_numpy(np.full(shape, np.nan if dtype.kind == "f" else -1, dtype))


@pytest.fixture(
    scope="module",
    params=[
        "onnx",
        "graph",
        "fake",
        "transformers",
        pytest.param("nf4", marks=NEEDS_BITSANDBYTES),
        pytest.param("int8", marks=NEEDS_BITSANDBYTES),
    ],
)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("decoder") / "bundle"
    if request.param == "fake":
        return Kept(FakeDecoder(hidden_size=32, vocab_size=50), 0)
    if request.param == "onnx":
        standin.write_bundle(folder)
        return Kept(OnnxDecoder.open(folder, ["CPUExecutionProvider"], threads=1), 1e-5)
    if request.param == "graph":
        standin.write_bundle(folder)
        session = open_decoder_session(folder, ["CPUExecutionProvider"], threads=1)
        return Kept(GraphDecoderOfADevice(session, CAPACITY + 8), 1e-5)
    from vz_edge.backends.transformers_decoder import TransformersDecoder

    if request.param == "transformers":
        return Kept(TransformersDecoder(plain_model()), 1e-5)
    return Kept(bitsandbytes_decoder(folder, bits=4 if request.param == "nf4" else 8), 0.03)


def plain_model():
    from tests.tiny import make_model

    model = make_model("llava", "mistral")
    from transformers import AutoModelForCausalLM

    language_model = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    language_model.model.load_state_dict(model.model.language_model.state_dict())
    language_model.lm_head.load_state_dict(model.lm_head.state_dict())
    return language_model


def bitsandbytes_decoder(folder: Path, bits: int) -> Decoder:
    from tests.tiny import make_checkpoint
    from vz_edge.backends.transformers_backend import TransformersBackend, require_kernel
    from vz_edge.bundle import LANGUAGE_MODEL
    from vz_edge.host.bnb import write_language_model
    from vz_edge.host.checkpoint import Checkpoint
    from vz_edge.host.families import spec_from_config

    make_checkpoint(folder / "checkpoint", decoder="mistral")
    checkpoint = Checkpoint.open(folder / "checkpoint")
    spec = spec_from_config(checkpoint.config).decoder
    require_kernel(bits, "cpu")
    write_language_model(checkpoint, spec, bits, "cpu", (2,), folder / LANGUAGE_MODEL, lambda *_: None)
    return TransformersBackend("cpu").open(folder, threads=None)


@pytest.fixture
def embeds(kept: Kept) -> np.ndarray:
    """[CAPACITY, hidden] in the decoder's own dtype."""
    return np.random.default_rng(0).standard_normal((CAPACITY, kept.decoder.hidden_size)).astype(kept.decoder.dtype)


def test_logits_are_float32_and_the_callers_to_keep(kept: Kept, embeds: np.ndarray) -> None:
    context = kept.decoder.start(CAPACITY)
    logits = context.append(embeds[:4])
    assert logits.shape == (kept.decoder.vocab_size,) and logits.dtype == np.float32
    assert np.isfinite(logits).all() and logits.std() > 0
    before = logits.copy()
    context.append(embeds[4:5])
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("pieces", [[1] * 6, [3, 1, 2], [5, 12, 7]], ids=str)
def test_pieces_give_the_logits_of_the_whole(kept: Kept, embeds: np.ndarray, pieces: list[int]) -> None:
    context = kept.decoder.start(CAPACITY)
    for count in pieces:
        logits = context.append(embeds[context.length : context.length + count])
        kept.assert_same(logits, kept.fresh(embeds[: context.length]))
    assert context.length == sum(pieces)


def test_logits_depend_on_what_was_read_and_on_its_order(kept: Kept, embeds: np.ndarray) -> None:
    whole = kept.fresh(embeds[:8])
    for other in (embeds[1:8], embeds[[1, 0, *range(2, 8)]]):
        assert np.linalg.norm(kept.fresh(other) - whole) > 2 * kept.tolerance * np.linalg.norm(whole)


def test_rewinding_forgets_what_came_after(kept: Kept, embeds: np.ndarray) -> None:
    context = kept.decoder.start(CAPACITY)
    context.append(embeds[:6])
    first = context.append(embeds[6:10])
    context.append(embeds[10:])
    context.rewind(6)
    assert context.length == 6
    np.testing.assert_array_equal(context.append(embeds[6:10]), first)
    context.rewind(10)
    assert context.length == 10
    context.rewind(0)
    kept.assert_same(context.append(embeds[12:15]), kept.fresh(embeds[12:15]))


def test_what_does_not_fit_is_refused_and_changes_nothing(kept: Kept, embeds: np.ndarray) -> None:
    context = kept.decoder.start(10)
    context.append(embeds[:8])
    for count in (0, 3):
        with pytest.raises(ContextLengthError, match="1 to 2 fit"):
            context.append(embeds[:count])
    for length in (9, -1):
        with pytest.raises(ContextLengthError, match="holds 8"):
            context.rewind(length)
    assert (context.length, context.capacity) == (8, 10)
    kept.assert_same(context.append(embeds[8:10]), kept.fresh(embeds[:10]))


def test_contexts_do_not_touch_each_other(kept: Kept, embeds: np.ndarray) -> None:
    one, other = kept.decoder.start(CAPACITY), kept.decoder.start(CAPACITY)
    one.append(embeds[:6])
    other.append(embeds[10:15])
    kept.assert_same(one.append(embeds[6:8]), kept.fresh(embeds[:8]))
    kept.assert_same(other.append(embeds[15:16]), kept.fresh(embeds[10:16]))


def test_a_token_of_cache_costs_bytes(kept: Kept) -> None:
    assert kept.decoder.cache_bytes_per_token > 0


def test_a_fork_goes_on_from_the_same_past_on_its_own(kept: Kept, embeds: np.ndarray) -> None:
    context = kept.decoder.start(CAPACITY)
    unread = context.fork()
    context.append(embeds[:8])
    context.rewind(6)
    fork = context.fork()
    assert (fork.length, fork.capacity) == (6, CAPACITY)
    kept.assert_same(context.append(embeds[10:13]), kept.fresh(embeds[[*range(6), *range(10, 13)]]))
    kept.assert_same(fork.append(embeds[6:9]), kept.fresh(embeds[:9]))
    kept.assert_same(context.append(embeds[13:14]), kept.fresh(embeds[[*range(6), *range(10, 14)]]))
    kept.assert_same(unread.append(embeds[:2]), kept.fresh(embeds[:2]))


def test_a_fork_of_the_first_tokens_may_be_larger_or_smaller(kept: Kept, embeds: np.ndarray) -> None:
    context = kept.decoder.start(10)
    context.append(embeds[:8])
    for capacity in (CAPACITY, 7):
        fork = context.fork(5, capacity)
        assert (fork.length, fork.capacity) == (5, capacity)
        kept.assert_same(fork.append(embeds[[9, 8]]), kept.fresh(embeds[[0, 1, 2, 3, 4, 9, 8]]))
    for length, capacity in ((9, CAPACITY), (6, 5), (-1, CAPACITY)):
        with pytest.raises(ContextLengthError, match="holds 8"):
            context.fork(length, capacity)
    kept.assert_same(context.append(embeds[8:10]), kept.fresh(embeds[:10]))


def test_the_cache_of_a_context_is_counted(kept: Kept, embeds: np.ndarray) -> None:
    context = kept.decoder.start(CAPACITY)
    context.append(embeds[:8])
    context.rewind(2)
    owned = not isinstance(context, GraphContext)  # whose cache is the decoder's
    assert context.cache_bytes >= 8 * kept.decoder.cache_bytes_per_token * owned
