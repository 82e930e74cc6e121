"""Stage "blocks": what a 13B decoder costs by block size, zero points, ONNX Runtime's options and float type.

Each variant in a process of its own (variant.py), the most telling first. Prefill is of 390 tokens, without a CUDA
graph; steps come after them. What reads fewer bytes is not always sooner: that is why it is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.stage import Record, Settings
from benchmarks.gpu.stages.headline import this_card
from benchmarks.gpu.variant import PROMPT_TOKENS, STEPS, Variant
from benchmarks.report import GB, Cell
from vz_edge.device.process import one_line

VARIANTS = (
    Variant("blocks of 128"),
    Variant("blocks of 32", block_size=32),
    Variant("blocks of 32 symmetric fused", block_size=32, zero_points=False, fused=True),
    Variant("blocks of 128 ORT's own options", own_options=False),
    Variant("blocks of 32 symmetric", block_size=32, zero_points=False),
    Variant("blocks of 64", block_size=64),
    Variant("blocks of 128 bfloat16", bfloat16=True),
    Variant("blocks of 32 fused", block_size=32, fused=True),
    Variant("8 bits blocks of 128", bits=8),
)
TINY = ("blocks of 32 symmetric fused",)  # a rehearsal has one, that differs from an export the most
LEAST_SEC = 8.0
TABLE = f"a 13B decoder: {PROMPT_TOKENS} tokens read, then {STEPS} steps"


def run(settings: Settings, record: Record) -> None:
    """Measure variant after variant while there is time."""
    measured: dict[str, Any] = {}
    chosen = [one for one in VARIANTS if settings.shape == "true" or one.name in TINY]
    for variant in chosen:
        if settings.left_sec < LEAST_SEC:
            record.note(f"Not begun, the time was over: {variant.name}")
            continue
        found = _measured(variant, settings)
        measured[variant.name] = found
        record.measured("variants", measured)
        record.row(TABLE, _row(variant, found, settings))
    rates = {name: 1 / found["graph_step_sec"] for name, found in measured.items() if "graph_step_sec" in found}
    best = max(rates, key=rates.__getitem__, default=None)
    record.line(
        f"{len(rates)} of {len(chosen)} variants; by a CUDA graph {best} decodes the most, {rates[best]:.0f} tokens/s"
        if best
        else f"none of {len(chosen)} variants decodes by a CUDA graph"
    )


def _measured(variant: Variant, settings: Settings) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu.variant", json.dumps(asdict(variant))]
    environment = os.environ | ({"ORT_FPA_INTB_GEMM": "1"} if variant.fused else {})
    try:
        done = subprocess.run(
            [*command, json.dumps(asdict(settings))],
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(settings.left_sec - 1, 1) if settings.left_sec < 1e6 else None,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = [line for line in error.stderr.splitlines() if line.strip()] or [f"status {error.returncode}"]
        found = {"failure": one_line(last[-1])}
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        found = {"failure": one_line(error)}
    for folder in Path(settings.work).glob("variant-*"):
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _row(variant: Variant, found: dict[str, Any], settings: Settings) -> dict[str, Cell]:
    cells: dict[str, Cell] = {"variant": variant.name}
    if "failure" in found:
        return cells | {"failed": found["failure"]}
    kind = "card_bytes" if "card_bytes" in found["memory"]["load"] else "peak_rss_bytes"
    taken = {
        stage: found["memory"][stage][kind] - found["memory"]["start"].get(kind, 0) for stage in ("load", "prefill")
    }
    cells |= {
        "weights": f"{found['weight_bytes'] / GB:.2f} GB",
        "taken by loading": f"{taken['load'] / GB:.2f} GB",
        "and a prefill": f"{taken['prefill'] / GB:.2f} GB",
        "prefill": f"{1e3 * found['prefill_sec']:.3g} ms",
        "decode": f"{1 / found['step_sec']:.3g} tokens/s",
    }
    if "graph_step_sec" not in found:
        return cells | {"decode, CUDA graph": "–", "failed": found["graph_failure"]}
    cells["decode, CUDA graph"] = f"{1 / found['graph_step_sec']:.3g} tokens/s"
    if card := this_card():
        share = found["weight_bytes"] / found["graph_step_sec"] / card.bandwidth_bytes_per_sec.value
        cells["of the memory bandwidth"] = f"{share:.0%}"
    return cells
