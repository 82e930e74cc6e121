"""transformers on a GPU: random LLaVA-NeXT models of the true 7B and 13B shapes, with and without ``vz_edge.compress``.

    python -m benchmarks.gpu                                         # under eight minutes on an H100 or H200
    python -m benchmarks.gpu --only 13B 4-bit 320                    # some of it; words of one kind are alternatives
    python -m benchmarks.gpu --device cpu --shape small --runs 2     # tries the script without a GPU

Needs torch, transformers and bitsandbytes, and no network: the models are made on the device. A picture fills a 2 x 2
grid, with a prompt of 70 text tokens and a greedy answer of 32 tokens, in bf16, LLM.int8() and NF4, in three ways:

* ``compress``: ``vz_edge.compress`` to 160, 320 and 640 tokens
* ``transformers``: the model as it is, with all tokens
* ``published``: the vision part the published way (published_vision.py), at 320 tokens

A process measures one model with one kind of weights (gpu_worker.py); it may run out of memory, or end in a kernel
that does not fit the card, without the others. What failed is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_configurations import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    SHAPES,
    WORDS,
    Configuration,
    Device,
    Job,
    configurations,
)
from benchmarks.gpu_report import write_reports
from vz_edge.device.doctor.process import one_line
from vz_edge.errors import DeviceError
from vz_edge.planning.devices import DeviceProfile, device_names, load_device
from vz_edge.profiling.environment import busy_percent

LIMIT_SEC = 450.0  # of all processes together


def run(job: Job, timeout_sec: float) -> tuple[list[dict], str]:
    """What the process could measure, one mapping a way, and how it ended."""
    with tempfile.TemporaryDirectory(prefix="vz-edge-gpu-") as folder:
        results = Path(folder) / "results.jsonl"
        results.touch()
        command = [sys.executable, "-m", "benchmarks.gpu_worker", json.dumps(asdict(job)), str(results)]
        try:
            done = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=timeout_sec
            )
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
            ended = f"the process ended with status {done.returncode} ({one_line(last)})"
        except subprocess.TimeoutExpired:
            ended = f"not reached within the {LIMIT_SEC:.0f} s of this benchmark"
        return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()], ended


def measure(
    chosen: Sequence[Configuration], device: Device, shape: str, runs: int
) -> dict[Configuration, dict[str, Any]]:
    """Every configuration's measurement, or ``{"failure": reason}``."""
    found: dict[Configuration, dict[str, Any]] = {}
    deadline = time.monotonic() + LIMIT_SEC
    for model, bits in dict.fromkeys((one.model, one.bits) for one in chosen):
        group = [one for one in chosen if (one.model, one.bits) == (model, bits)]
        print(f"{model}, {bits} bits", flush=True)
        job = Job(device, SHAPES[shape][model], bits, [(one.way, one.tokens) for one in group], runs)
        lines, ended = run(job, max(deadline - time.monotonic(), 0.1))
        for line in lines:  # a way may have a second line: its CUDA graph
            key = Configuration(model, bits, line.pop("way"), line.pop("tokens"))
            found[key] = found.get(key, {}) | line
        for one in group:
            found.setdefault(one, {"failure": ended})
    return found


def profile_of(device_name: str) -> DeviceProfile | None:
    """The shipped profile of the card that torch calls ``device_name``; None where there is none.

    Profiles are called after the card, then its memory where that is not clear: "NVIDIA A800-SXM4-80GB" is a800-80.
    """
    words = device_name.lower().replace("-", " ").split()
    card = [word for word in words if word not in ("nvidia", "geforce", "pcie") and not word.startswith("sxm")]
    card = [word for word in card if not word.endswith("gb") and not word.startswith("hbm")]
    for name in device_names():
        parts = name.split("-")
        if card in (parts, parts[:-1]):
            return load_device(name)
    return None


def require_device(device: str) -> None:
    """End with one line where torch has no CUDA device."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit(
                f"benchmarks.gpu: torch {torch.__version__} has no CUDA device here; run it on a machine with an "
                "NVIDIA GPU and a CUDA build of torch, or try the script with --device cpu --shape small"
            )


def main() -> None:
    """Measure and write the reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="full", help="small: a tiny model for both sizes")
    parser.add_argument("--only", nargs="+", default=[], choices=tuple(WORDS), metavar="WORD", help=", ".join(WORDS))
    parser.add_argument("--profile", help="predict for this device; default: the card's own, where there is one")
    parser.add_argument("--runs", type=int, default=10, help="after two that are not counted")
    reports = Path(os.environ.get("OUT") or "build/reports")
    parser.add_argument("--reports", type=Path, default=reports, help="default: $OUT, or build/reports")
    arguments = parser.parse_args()
    chosen = configurations(arguments.only)
    if not chosen:
        parser.error(f"--only {' '.join(arguments.only)}: nothing is all of that; published is measured at 320 alone")
    require_device(arguments.device)
    try:
        profile = load_device(arguments.profile) if arguments.profile else None
    except DeviceError as error:
        parser.error(str(error))
    busy = busy_percent()
    found = measure(chosen, arguments.device, arguments.shape, arguments.runs)
    device_name = next((result["device_name"] for result in found.values() if "device_name" in result), "unknown")
    write_reports(
        found,
        device_name,
        profile or profile_of(device_name),
        SHAPES[arguments.shape],
        busy,
        {"runs": arguments.runs, "prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS},
        arguments.reports,
    )


if __name__ == "__main__":
    main()
