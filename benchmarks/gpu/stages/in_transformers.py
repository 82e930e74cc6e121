"""Stage "in_transformers": the rows of ``python -m benchmarks.gpu`` that the time allows, the barred ones first.

bf16, 8-bit and 4-bit weights of bitsandbytes, 2880 and 320 tokens, ``vz_edge.compress`` beside the published way. All
rows are written anew after each model, so that a stage that is killed has those of the models before.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from benchmarks.gpu.configurations import MODELS, SHAPES, Configuration, configurations
from benchmarks.gpu.jobs import measure
from benchmarks.gpu.report import BARS, bars, row
from benchmarks.gpu.stage import Record, Settings

SHAPE = {"true": "full", "tiny": "small"}
RUNS = {"true": 5, "tiny": 1}
WAYS_CUT = (160, 320, None)  # tokens: 640 has rows of its own elsewhere
RESERVE_SEC = 5.0
LEAST_SEC = 10.0


def run(settings: Settings, record: Record) -> None:
    """Measure model after model."""
    chosen = [one for one in configurations([]) if one.tokens in WAYS_CUT]
    if settings.shape == "tiny":
        chosen = [one for one in chosen if (one.model, one.bits, one.tokens) == ("13B", 4, 320)]
    found: dict[Configuration, dict[str, Any]] = {}
    for _, group in groupby(chosen, key=lambda one: MODELS.index((one.model, one.bits))):
        rows = list(group)
        left_sec = settings.left_sec - RESERVE_SEC
        if left_sec < LEAST_SEC:
            record.note(
                f"Not begun, the time was over: {', '.join(sorted({f'{o.model} {o.bits} bits' for o in rows}))}"
            )
            continue
        measured = measure(rows, settings.device, SHAPE[settings.shape], RUNS[settings.shape], min(left_sec, 1e6))
        found |= measured
        for one, result in measured.items():
            record.row("LLaVA-NeXT in transformers", row(one, result))
        record.measured("rows", [one._asdict() | result for one, result in found.items()])
    reached = bars(found) if settings.shape == "true" and settings.device == "cuda" else []
    for bar in reached:
        record.bar(bar)
    good = sum("failure" not in result for result in found.values())
    record.line(f"{good} of {len(found)} rows measured, {len(chosen)} wanted; {len(reached)} of {BARS} bars measured")
    record.note(f"The shapes are {SHAPES[SHAPE[settings.shape]]}.")
