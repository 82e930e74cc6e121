"""The memory model against measurements: the paper's table on an A800, and this package's own on a processor.

One set of constants. 200 prompt tokens are assumed for ScienceQA; 1 MB is nvidia-smi's MiB.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.make_checkpoint import model_of_shape
from vz_edge.bundle import bitsandbytes_weights, default_weights
from vz_edge.planning.devices import load_device
from vz_edge.planning.memory import bundle_bytes
from vz_edge.planning.question import question_of
from vz_edge.planning.resident import (
    MemoryPlan,
    bitsandbytes_cpu_memory,
    bitsandbytes_gpu_memory,
    onnxruntime_cpu_memory,
    onnxruntime_gpu_memory,
    transformers_memory,
)
from vz_edge.recipe import load_recipe

MIB = 2**20
PAPER = {  # (model, bits, tokens): MiB and the stage that explains it
    ("llava-next-7b", 16, None): (18952, "decode"),
    ("llava-next-13b", 16, None): (36721, "decode"),
    ("llava-next-13b", 16, 320): (28810, "picture"),
    ("llava-next-13b", 8, 320): (16632, "picture"),
    ("llava-next-13b", 4, 320): (10176, "picture"),
}


NEXT_7B = load_recipe("llava-next-7b").model


def published(name: str, bits: int, tokens: int | None) -> MemoryPlan:
    model = load_recipe(name).model
    question = question_of(model, tokens, None, prompt_tokens=200, answer_tokens=8)
    return transformers_memory(model, default_weights(bits), question, selects=tokens is not None)


@pytest.mark.parametrize("row", PAPER, ids=str)
def test_a_row_of_the_papers_table_is_explained_within_8_percent(row: tuple) -> None:
    measured_mib, stage = PAPER[row]
    plan = published(*row)
    assert plan.peak_bytes / MIB == pytest.approx(measured_mib, rel=0.08)
    assert plan.peak_stage == stage


def test_without_an_earlier_picture_the_13b_row_is_not_explained() -> None:
    """The one assumption of the model: what segments an earlier, smaller picture left behind."""
    for name, miss in (("llava-next-7b", -0.06), ("llava-next-13b", -0.135)):
        plan = published(name, 16, None)
        alone = plan.peak_bytes - plan.parts["allocator"]
        assert alone / MIB / PAPER[name, 16, None][0] - 1 == pytest.approx(miss, abs=0.01)


def test_selection_in_the_published_code_pays_for_the_attention_of_all_layers() -> None:
    chosen, vanilla = published("llava-next-13b", 16, 320), published("llava-next-13b", 16, None)
    matrices = 5 * 24 * 16 * 577 * 577 * 2
    more = chosen.stages["picture"]["workspace"] - vanilla.stages["picture"]["workspace"]
    assert more == matrices and matrices > 1.1 * 2**30


def test_a_13b_on_the_processor_peaks_where_it_was_measured() -> None:
    """profiles/reports/answer_memory.md: 8.03 GB when loaded, 9.09 GB with the picture, which is the peak."""
    model = load_recipe("llava-next-13b").model
    plan = onnxruntime_cpu_memory(model, default_weights(4), question_of(model, 320, 5, 70, 32))
    assert plan.peak_stage == "picture"
    assert plan.peak_bytes == pytest.approx(9.0943e9, rel=0.03)
    assert sum(plan.stages["load"].values()) == pytest.approx(8.0313e9, rel=0.03)


@pytest.mark.parametrize(("prompt", "answer_peak"), [(106, 0.948e9), (1668, 1.754e9)])
def test_a_1b_on_the_processor_peaks_where_it_was_measured(prompt: int, answer_peak: float) -> None:
    """VmHWM of a fresh process, reset between stages: picture of 5 tiles, then 320 + ``prompt`` tokens."""
    model = model_of_shape("1b")
    plan = onnxruntime_cpu_memory(model, default_weights(4), question_of(model, 320, 5, prompt, 4))
    assert plan.peak_bytes == pytest.approx(2.037e9, rel=0.02)
    assert sum(plan.stages["answer"].values()) == pytest.approx(answer_peak, rel=0.02)


def test_llava_13b_does_not_fit_an_orin_nano_and_7b_does() -> None:
    """As published for NanoLLM at 4 bits: LLaVA-13B runs out of memory there, LLaVA-7B answers."""
    board = load_device("orin-nano-8")
    for name, fits in (("llava-1.5-7b", True), ("llava-1.5-13b", False)):
        model = load_recipe(name).model
        plan = onnxruntime_gpu_memory(model, default_weights(4), question_of(model, None, None, 40, 32), unified=True)
        assert (plan.peak_bytes <= board.app_memory_bytes.value) == fits


def test_a_gpu_holds_the_bundle_but_for_the_token_table() -> None:
    model = load_recipe("llava-next-llama3-8b").model
    on_disk = bundle_bytes(model, default_weights(4), "cuda")
    plan = onnxruntime_gpu_memory(model, default_weights(4), question_of(model, 320, None, 70, 32), unified=False)
    held = sum(plan.parts[part] for part in ("vision", "decoder", "lm_head"))
    assert held == sum(on_disk.values()) - on_disk["embedding"]


@settings(deadline=None)
@given(st.sampled_from([160, 320, 640]), st.sampled_from([4, 8]), st.integers(1, 2000), st.integers(1, 500))
def test_more_of_anything_never_takes_less(tokens: int, bits: int, prompt: int, answer: int) -> None:
    model = NEXT_7B
    weights, more_bits = default_weights(bits), default_weights(2 * bits)  # type: ignore[arg-type]
    question = question_of(model, tokens, 3, prompt, answer)
    larger = question_of(model, 2 * tokens, 5, prompt + 1, answer + 1)
    for plan in (
        lambda w, q: onnxruntime_cpu_memory(model, w, q),
        lambda w, q: onnxruntime_gpu_memory(model, w, q, unified=True),
        lambda w, q: transformers_memory(model, w, q, selects=True),
    ):
        assert plan(weights, question).peak_bytes < plan(weights, larger).peak_bytes
        assert plan(weights, question).peak_bytes < plan(more_bits, question).peak_bytes


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bundle_with_bitsandbytes_weights_needs_less_than_the_published_code(bits: int) -> None:
    """The same weights and tokens: the attention of the tower, and a cache that is copied, are what it saves."""
    model = load_recipe("llava-next-13b").model
    weights = bitsandbytes_weights(bits)  # type: ignore[arg-type]
    question = question_of(model, 320, None, prompt_tokens=200, answer_tokens=8)
    ours = bitsandbytes_gpu_memory(model, weights, question, unified=False)
    theirs = transformers_memory(model, default_weights(bits), question, selects=True)
    stored = bundle_bytes(model, weights, "cuda")
    assert stored["decoder"] + stored["lm_head"] < ours.peak_bytes < theirs.peak_bytes
    shared = bitsandbytes_gpu_memory(model, weights, question, unified=True)
    assert shared.peak_bytes - ours.peak_bytes > 100e6  # the host's process
    # On a processor the tower is mapped while the model answers.
    assert "vision" not in bitsandbytes_cpu_memory(model, weights, question).stages["answer"]
