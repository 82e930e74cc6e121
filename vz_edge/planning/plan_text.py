"""A plan in words and as JSON: the verdicts of a row, and what must be known to read the figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from vz_edge.planning.devices import DeviceProfile
from vz_edge.planning.plan import Asked, Row
from vz_edge.planning.roofline import Efficiency, load_runtime

ASSUMED = "assumed"  # how the source of a figure begins that nobody measured or published
NO_SCORE = "no published figure"


def gigabytes(size_bytes: float) -> str:
    """Bytes in GB of 1e9."""
    return f"{size_bytes / 1e9:.1f} GB"


def fit_verdict(row: Row) -> str:
    """Whether it fits, and by how much."""
    if row.fit == "fits":
        return f"fits ({gigabytes(row.spare_bytes)} to spare)"
    if row.fit == "fits with less context":
        return f"fits with less context (at most {row.fitting_context_tokens} tokens)"
    return f"does not fit ({gigabytes(-row.spare_bytes)} short)"


def vanilla_verdict(row: Row) -> str | None:
    """Whether it beats the vanilla 7B, with the ratios; None where there is nothing to compare with."""
    if row.vanilla is None or row.speedup is None or row.memory_ratio is None:
        return None
    ratio, word = (row.speedup, "faster") if row.speedup >= 1 else (1 / row.speedup, "slower")
    times = f"{ratio:.1f}x {word} first token" if ratio >= 1.05 else "first token at the same time"
    ratios = f"({times}, {row.memory_ratio:.2f}x memory)"
    if row.vanilla.fit == "does not fit":
        either = "either " if row.fit == "does not fit" else ""
        return f"the vanilla 7B does not fit here {either}{ratios}"
    return f"beats the vanilla 7B: {'yes' if row.beats_vanilla else 'no'} {ratios}"


def frames_verdict(row: Row) -> str | None:
    """Whether it keeps up with the frames; None where no rate was asked for."""
    if row.frames_per_minute is None:
        return None
    answer = f"{'yes' if row.fast_enough else 'no'} ({digits(row.prediction.answer_sec)} s a frame)"
    return f"{row.frames_per_minute:g} frames a minute: {answer}"


def verdicts(row: Row) -> list[str]:
    """All of them that apply."""
    return [text for text in (fit_verdict(row), vanilla_verdict(row), frames_verdict(row)) if text]


def digits(value: float) -> str:
    """Seconds or tokens a second, to what a prediction is worth: two or three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def score_text(row: Row) -> str:
    """The published score, where there is one."""
    return NO_SCORE if row.score is None else f"{row.score:.1f}"


def scores(rows: Sequence[Row]) -> str:
    """The published scores of these rows, and of what they are compared with, each once."""
    compared = [row.vanilla for row in rows if row.vanilla]
    labels = {_score_label(row): None for row in (*rows, *compared) if row.score is not None}
    return ", ".join(labels)


def notes(rows: Sequence[Row], asked: Asked) -> list[str]:
    """What must be known to read the figures of these rows."""
    if not rows:
        return []
    return [
        f"{question_note(asked)} 1 GB is 1e9 bytes; memory is "
        "weights + KV cache + workspace and runtime, of the stage that needs the most.",
        *_assumed_note(rows, asked.runtime),
        *_score_notes(rows),
    ]


def question_note(asked: Asked) -> str:
    """What was predicted."""
    question = f"{asked.prompt_tokens} prompt tokens and an answer of {asked.answer_tokens}"
    tiles = "a picture of the most tiles" if asked.tiles is None else f"a picture of {asked.tiles} tiles"
    return f"Predicted for {tiles}, {question}, with {load_runtime(asked.runtime).title}."


def sources(device: DeviceProfile) -> Iterator[tuple[str, str, str]]:
    """(figure, value, source) of everything that a device's profile says."""
    yield "memory", gigabytes(device.memory_bytes.value), device.memory_bytes.source
    yield "for an application", gigabytes(device.app_memory_bytes.value), device.app_memory_bytes.source
    bandwidth = device.bandwidth_bytes_per_sec
    yield "bandwidth", f"{bandwidth.value / 1e9:,.4g} GB/s", bandwidth.source
    for field in dataclasses.fields(device.peaks_flops_per_sec):
        figure = getattr(device.peaks_flops_per_sec, field.name)
        if figure is not None:
            yield f"peak, {field.name}", f"{figure.value / 1e12:,.4g} T/s", figure.source
    if device.compute_capability:
        yield "compute capability", f"{device.compute_capability.value:.1f}", device.compute_capability.source


def runtime_sources(efficiency: Efficiency) -> Iterator[tuple[str, str, str]]:
    """(figure, value, source) of everything that is known of a runtime on a class of device."""
    for bits, share in efficiency.linear.items():
        yield f"linear layers, {bits} bits", f"{share.share:.0%} of {share.peak}", share.source
    attention = efficiency.attention
    yield "attention", f"{attention.share:.0%} of {attention.peak}", attention.source
    yield "bandwidth", f"{efficiency.bandwidth_share.value:.0%}", efficiency.bandwidth_share.source
    yield "a launch", f"{efficiency.launch_sec.value * 1e6:g} µs", efficiency.launch_sec.source
    yield "a written token", f"{efficiency.token_sec.value * 1e3:g} ms", efficiency.token_sec.source
    if efficiency.pixel_sec:
        yield "a pixel", f"{efficiency.pixel_sec.value * 1e9:g} ns", efficiency.pixel_sec.source


def to_json(rows: Sequence[Row], asked: Asked) -> str:
    """The plan as text."""
    data = {"asked": dataclasses.asdict(asked), "notes": notes(rows, asked), "rows": [as_data(row) for row in rows]}
    return json.dumps(data, indent=2, ensure_ascii=False)


def as_data(row: Row) -> dict[str, Any]:
    """A row as plain data: bytes, seconds and verdicts."""
    found = row.prediction
    data = {
        "model": row.candidate.recipe.name,
        "bits": row.candidate.bits,
        "tokens": row.candidate.tokens,
        "device": row.device.name,
        "image_tokens": found.question.image_tokens,
        "context_tokens": row.context_tokens,
        "fit": row.fit,
        "fitting_context_tokens": row.fitting_context_tokens,
        "app_memory_bytes": row.device.app_memory_bytes.value,
        "peak_bytes": row.memory.peak_bytes,
        "spare_bytes": row.spare_bytes,
        "peak_stage": row.memory.peak_stage,
        "memory": row.memory.stages,
        "preprocess_sec": found.preprocess_sec,
        "vision_sec": found.vision_sec,
        "prefill_sec": found.prefill_sec,
        "ttft_sec": found.ttft_sec,
        "decode_tokens_per_sec": found.tokens_per_sec,
        "answer_sec": found.answer_sec,
        "published_score": row.score,
        "fast_enough": row.fast_enough,
        "beats_vanilla_7b": row.beats_vanilla,
        "first_token_speedup": row.speedup,
        "memory_ratio": row.memory_ratio,
        "verdicts": verdicts(row),
    }
    return data | ({"vanilla_7b": as_data(row.vanilla)} if row.vanilla else {})


def _assumed_note(rows: Sequence[Row], runtime: str) -> Iterator[str]:
    counts = []
    for name in dict.fromkeys(row.device.device_class for row in rows):
        found = [source for _, _, source in runtime_sources(load_runtime(runtime).efficiency(name))]
        if assumed := sum(source.startswith(ASSUMED) for source in found):
            counts.append(f"{assumed} of {len(found)} on {name}")
    if counts:
        yield (
            f"Of what {runtime} reaches on such devices these figures are assumed, neither measured nor published: "
            f"{', '.join(counts)} (the page of --html has every source)."
        )


def _score_notes(rows: Sequence[Row]) -> Iterator[str]:
    recipes = {row.candidate.recipe.name: row.candidate.recipe for row in rows}
    published = {name: recipe.published_accuracy for name, recipe in recipes.items() if recipe.published_accuracy}
    if not published:
        return
    benchmarks = ", ".join(next(iter(published.values())).vanilla_scores)
    yield (
        f"Published score: the vanilla model's mean of {benchmarks} in percent, times the share that the budget keeps "
        "on average, without training."
    )
    known = {name: found.quantised for name, found in published.items() if found.quantised}
    if not known:
        yield "Bits are not in the score: nothing is published of them for these models."
    for name, found in known.items():
        kept = ", ".join(f"{percent} at {bits} bits" for bits, percent in found.percent_of_vanilla.items())
        yield (
            f"Bits are not in the score. Published of them is one case, {name} at {found.tokens} tokens, in percent of "
            f"vanilla: {kept} ({found.source})."
        )


def _score_label(row: Row) -> str:
    tokens = "with all tokens" if row.candidate.tokens is None else f"at {row.candidate.tokens}"
    return f"{row.candidate.recipe.name} {tokens} {score_text(row)}"
