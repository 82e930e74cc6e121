"""Rows of a plan: what fits, by how much, what beats the vanilla 7B, and which are the best for a device."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vz_edge.bundle import default_weights
from vz_edge.errors import BudgetError, ContextLengthError, RequestError
from vz_edge.planning.devices import DeviceProfile, load_device
from vz_edge.planning.plan import ALL_BITS, Asked, Candidate, Row, candidates, plan_row, solve
from vz_edge.planning.plan_text import as_data, fit_verdict, frames_verdict, notes, scores, vanilla_verdict
from vz_edge.planning.predict import memory_plan
from vz_edge.recipe import load_recipe, recipe_names

RECIPES = {name: load_recipe(name) for name in recipe_names()}
ORIN = load_device("agx-orin-64")
SMALL = Candidate(RECIPES["llava-next-13b"], 4, 320)
VANILLA = Candidate(RECIPES["llava-next-7b"], 16, None)


def with_memory(device: DeviceProfile, app_memory_bytes: int) -> DeviceProfile:
    figure = dataclasses.replace(device.app_memory_bytes, value=app_memory_bytes)
    return dataclasses.replace(device, app_memory_bytes=figure)


def peak_bytes(row: Row, context_tokens: int) -> int:
    question = row.prediction.question
    longer = dataclasses.replace(question, answer_tokens=context_tokens - question.prefill_tokens)
    candidate = row.candidate
    weights = default_weights(candidate.bits)
    model, selects = candidate.recipe.model, candidate.tokens is not None
    return memory_plan(model, weights, longer, row.device, "onnxruntime", selects).peak_bytes


def test_the_papers_13b_against_its_vanilla_7b() -> None:
    """10176 MB at 4 bits and 320 tokens against 18952 MB (arXiv 2412.04467, table 16)."""
    row = plan_row(SMALL, load_device("a800-80"), Asked("transformers", prompt_tokens=200, answer_tokens=1))
    assert row.memory_ratio == pytest.approx(10176 / 18952, rel=0.1)
    assert row.speedup and row.speedup > 1 and row.beats_vanilla
    assert row.vanilla and row.vanilla.candidate == VANILLA


def test_verdicts_in_words() -> None:
    row = plan_row(SMALL, ORIN, Asked(frames_per_minute=10))
    assert fit_verdict(row) == f"fits ({(63_928_532_992 - row.memory.peak_bytes) / 1e9:.1f} GB to spare)"
    text = vanilla_verdict(row)
    assert text == f"beats the vanilla 7B: yes ({row.speedup:.1f}x faster first token, {row.memory_ratio:.2f}x memory)"
    assert frames_verdict(row) == f"10 frames a minute: yes ({row.prediction.answer_sec:.2f} s a frame)"
    hurried = plan_row(SMALL, ORIN, Asked(frames_per_minute=600))
    assert hurried.fast_enough is False and "frames a minute: no" in (frames_verdict(hurried) or "")

    between = with_memory(ORIN, 10_000_000_000)
    assert (vanilla_verdict(plan_row(SMALL, between, Asked())) or "").startswith("the vanilla 7B does not fit here (")
    less = plan_row(SMALL, between, Asked(max_context=4096))
    assert fit_verdict(less) == f"fits with less context (at most {less.fitting_context_tokens} tokens)"
    short = plan_row(SMALL, with_memory(ORIN, 8_000_000_000), Asked())
    assert fit_verdict(short) == f"does not fit ({(short.memory.peak_bytes - 8e9) / 1e9:.1f} GB short)"
    assert not short.beats_vanilla and "does not fit here either" in (vanilla_verdict(short) or "")
    slower = plan_row(Candidate(RECIPES["llava-next-34b"], 16, None), load_device("h200"), Asked())
    assert "beats the vanilla 7B: no (" in (vanilla_verdict(slower) or "")
    assert "x slower first token" in (vanilla_verdict(slower) or "")
    eight = plan_row(dataclasses.replace(VANILLA, bits=8), load_device("a800-80"), Asked("transformers"))
    assert (vanilla_verdict(eight) or "").startswith("beats the vanilla 7B: no (first token at the same time, 0.")


def test_what_there_is_to_compare_with() -> None:
    assert plan_row(VANILLA, ORIN, Asked()).vanilla is None
    assert plan_row(Candidate(RECIPES["vz-demo"], 4, 320), ORIN, Asked()).vanilla is None
    for name, recipe in RECIPES.items():
        row = plan_row(Candidate(recipe, 4, recipe.tokens), ORIN, Asked())
        assert (row.vanilla is None) == (name == "vz-demo")
    # A prompt that fits beside 320 image tokens and not beside all of the vanilla model's.
    assert plan_row(SMALL, ORIN, Asked(prompt_tokens=2000)).vanilla is None


@settings(deadline=None, max_examples=40)
@given(st.integers(6_000_000_000, 16_000_000_000), st.integers(500, 4096), st.sampled_from(["agx-orin-64", "cpu"]))
def test_the_longest_context_that_fits_is_the_longest(app_memory_bytes: int, max_context: int, name: str) -> None:
    device = with_memory(load_device(name), app_memory_bytes)
    row = plan_row(SMALL, device, Asked(max_context=max_context))
    shortest, longest = row.prediction.question.prefill_tokens + 1, row.fitting_context_tokens
    assert row.memory.peak_bytes == peak_bytes(row, max_context)
    if longest is None:
        assert row.fit == "does not fit" and peak_bytes(row, shortest) > app_memory_bytes
        return
    assert shortest <= longest <= max_context and peak_bytes(row, longest) <= app_memory_bytes
    assert (row.fit == "fits") == (longest == max_context)
    if longest < max_context:
        assert row.fit == "fits with less context" and peak_bytes(row, longest + 1) > app_memory_bytes


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(["orin-nano-8", "orin-nx-16", "rtx-4060-ti-16", "agx-orin-32", "cpu"]),
    st.floats(0.1, 60),
    st.floats(1, 60),
)
def test_solve_finds_all_that_is_possible_and_the_best_first(name: str, within: float, rate: float) -> None:
    asked, device = Asked(frames_per_minute=rate), load_device(name)
    found = [
        candidate
        for recipe in (RECIPES["llava-next-13b"], RECIPES["llava-1.5-7b"], RECIPES["vz-demo"])
        for candidate in candidates([recipe], ALL_BITS, [*map(str, recipe.presets), "all"])
    ]
    rows = solve(found, device, asked, within)
    possible = [plan_row(candidate, device, asked) for candidate in found]
    possible = [row for row in possible if row.fit == "fits" and row.prediction.ttft_sec <= within]
    possible = [row for row in possible if row.prediction.answer_sec <= 60 / rate]
    assert sorted(row.candidate.label for row in rows) == sorted(row.candidate.label for row in possible)
    for better, worse in itertools.pairwise(rows):
        assert better.score is not None or worse.score is None
        if better.score is not None and worse.score is not None:
            assert better.score >= worse.score
        if better.score == worse.score:
            assert better.prediction.answer_sec <= worse.prediction.answer_sec


def test_solve_leaves_out_what_the_context_cannot_hold() -> None:
    found = candidates([RECIPES["llava-next-7b"]], [4], ["320", "all"])
    assert [row.candidate.tokens for row in solve(found, ORIN, Asked(answer_tokens=2000))] == [320]


def test_notes_say_what_the_figures_are_worth() -> None:
    row = plan_row(SMALL, ORIN, Asked())
    text = " ".join(notes([row], Asked()))
    assert "6 of 8 on jetson" in text and "94.0 at 4 bits" in text and "70 prompt tokens" in text
    assert scores([row]) == "llava-next-13b at 320 64.6, llava-next-7b with all tokens 66.5"
    unscored = plan_row(Candidate(RECIPES["vz-demo"], 4, 320), ORIN, Asked())
    assert unscored.score is None and scores([unscored]) == "" and notes([], Asked()) == []


def test_a_row_as_data_adds_up() -> None:
    data = as_data(plan_row(SMALL, ORIN, Asked()))
    assert data["peak_bytes"] == sum(data["memory"][data["peak_stage"]].values())
    assert data["spare_bytes"] == data["app_memory_bytes"] - data["peak_bytes"]
    assert data["ttft_sec"] == data["preprocess_sec"] + data["vision_sec"] + data["prefill_sec"]
    assert data["first_token_speedup"] == data["vanilla_7b"]["ttft_sec"] / data["ttft_sec"]


def test_impossible_numbers_are_named() -> None:
    wrong = [
        (RequestError, "--frames-per-minute 0 is impossible", Asked(frames_per_minute=0)),
        (RequestError, "--frames-per-minute nan is impossible", Asked(frames_per_minute=float("nan"))),
        (RequestError, "--max-context 0 is impossible", Asked(max_context=0)),
        (RequestError, "llava-next-13b: a picture of 2 tiles is impossible", Asked(tiles=2)),
        (RequestError, "-1 prompt tokens are impossible", Asked(prompt_tokens=-1)),
        (ContextLengthError, "--max-context 300 is impossible, since .* are 454 tokens", Asked(max_context=300)),
        (ContextLengthError, "--max-context 5000 is impossible, .* context is 4096", Asked(max_context=5000)),
        (ContextLengthError, "ask for a shorter answer or fewer tokens", Asked(answer_tokens=5000)),
    ]
    for error, message, asked in wrong:
        with pytest.raises(error, match=message):
            plan_row(SMALL, ORIN, asked)
    with pytest.raises(RequestError, match="--within-sec 0 is impossible"):
        solve([SMALL], ORIN, Asked(), 0)
    with pytest.raises(RequestError, match="--bits 5 is impossible; expected 4, 8 or 16"):
        candidates([RECIPES["llava-next-7b"]], [4, 5], [])
    with pytest.raises(BudgetError, match="llava-next-7b: --tokens 321 is impossible"):
        candidates([RECIPES["llava-next-7b"]], [4], ["321"])
