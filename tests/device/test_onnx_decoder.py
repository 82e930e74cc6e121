"""ONNX Runtime's decoder against plain runs of its session (tests/contract has what every decoder keeps)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.device import standin
from vz_edge.device.onnx_decoder import KVCache, OnnxDecoder
from vz_edge.errors import CorruptBundleError

EMBEDS = np.random.default_rng(0).standard_normal((60, standin.HIDDEN)).astype(np.float32)


@pytest.fixture(scope="module")
def decoder(bundle: Path) -> OnnxDecoder:
    return OnnxDecoder.open(bundle, ["CPUExecutionProvider"], threads=1)


def at_once(decoder: OnnxDecoder, embeds: np.ndarray) -> np.ndarray:
    """Logits from one plain run with an empty past: no binding, no shared buffer."""
    empty = np.zeros((1, standin.KV_HEADS, 0, standin.HEAD_DIM), np.float32)
    feeds = {f"past_key_values.{name}": empty for name in decoder.cache_names}
    feeds |= {"inputs_embeds": embeds[None], "attention_mask": np.ones((1, len(embeds)), np.int64)}
    return decoder.session.run(["logits"], feeds)[0][0, 0]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_chunks_of_any_size_give_the_logits_of_the_whole(decoder: OnnxDecoder, chunks: list[int]) -> None:
    context = decoder.start(60)
    for size in chunks:
        logits = context.append(EMBEDS[context.length : context.length + size])
        np.testing.assert_allclose(logits, at_once(decoder, EMBEDS[: context.length]), atol=1e-5)
    assert context.length == sum(chunks)


def test_capacity_that_is_not_used_costs_no_memory(decoder: OnnxDecoder) -> None:
    tokens = 4_000_000  # a gigabyte of cache
    assert decoder.cache_bytes_per_token * tokens > 1e9
    before = resident_bytes()
    context = decoder.start(tokens)
    context.append(EMBEDS[:20])
    assert resident_bytes() - before < 100e6  # the mask's int64 ones are 32 MB


def test_a_cache_counts_the_memory_that_it_takes(decoder: OnnxDecoder) -> None:
    for capacity in (100_352, 100_001):  # heads that begin at a page, and in the midst of one
        before = resident_bytes()
        cache = KVCache(decoder, capacity)
        assert cache._pages is not None
        cache._pages[..., :50_000, :] = 1
        taken = resident_bytes() - before
        assert taken - 2**20 < cache.taken_bytes(50_000) < taken + 2**20
        assert cache.taken_bytes(capacity) == cache._pages.nbytes
        assert 0 <= cache.taken_bytes(1) < 2**16
        del cache


def test_a_graph_of_another_kind_is_a_corrupt_bundle(tmp_path: Path) -> None:
    onnx.save(standin.vision_graph("llava", None, np.dtype(np.float32)), tmp_path / "decoder.onnx")
    with pytest.raises(CorruptBundleError, match="no bundle has"):
        OnnxDecoder.open(tmp_path, ["CPUExecutionProvider"], threads=1)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
