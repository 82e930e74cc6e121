"""Jobs, each in a process of its own: what they could measure in the time there is, and how they ended."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.configurations import SHAPES, Configuration, Device, Job
from vz_edge.device.process import one_line

LIMIT_SEC = 450.0  # of all processes together


def run(job: Job, timeout_sec: float, limit_sec: float) -> tuple[list[dict], str]:
    """What the process could measure, one mapping a way, and how it ended."""
    with tempfile.TemporaryDirectory(prefix="vz-edge-gpu-") as folder:
        results = Path(folder) / "results.jsonl"
        results.touch()
        command = [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(asdict(job)), str(results)]
        try:
            done = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=timeout_sec
            )
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
            ended = f"the process ended with status {done.returncode} ({one_line(last)})"
        except subprocess.TimeoutExpired:
            ended = f"not reached within the {limit_sec:.0f} s of this benchmark"
        return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()], ended


def measure(
    chosen: Sequence[Configuration], device: Device, shape: str, runs: int, limit_sec: float = LIMIT_SEC
) -> dict[Configuration, dict[str, Any]]:
    """Every configuration's measurement, or ``{"failure": reason}``; after ``limit_sec`` the rest is a failure."""
    found: dict[Configuration, dict[str, Any]] = {}
    deadline = time.monotonic() + limit_sec
    for model, bits in dict.fromkeys((one.model, one.bits) for one in chosen):
        group = [one for one in chosen if (one.model, one.bits) == (model, bits)]
        print(f"{model}, {bits} bits", flush=True)
        job = Job(device, SHAPES[shape][model], bits, [(one.way, one.tokens) for one in group], runs)
        lines, ended = run(job, max(deadline - time.monotonic(), 0.1), limit_sec)
        for line in lines:  # a way may have a second line: its CUDA graph
            key = Configuration(model, bits, line.pop("way"), line.pop("tokens"))
            found[key] = found.get(key, {}) | line
        for one in group:
            found.setdefault(one, {"failure": ended})
    return found
