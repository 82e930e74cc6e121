"""The most memory that a Jetson used while something ran, polled by NVIDIA's ``tegrastats``.

Unlike readings between stages it sees what rises and falls within one; it counts the whole system, not one process.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

POLL_MS = 200
# "RAM 3241/7620MB (lfb 4x2MB) ..." in each line. Source: "tegrastats Utility" in the Jetson Linux Developer Guide; its
# MB are MiB, as its total shows (7,802,936 kB of MemTotal on an 8 GB board).
RAM = re.compile(r"\bRAM (\d+)/\d+\s?MB")


@dataclass
class RamPeak:
    """``bytes`` is None until the block has ended, and where tegrastats is missing or said nothing."""

    bytes: int | None = None


@contextmanager
def watch_ram(command: str = "tegrastats") -> Iterator[RamPeak]:
    """Poll the system's memory while the block runs."""
    peak = RamPeak()
    with tempfile.TemporaryDirectory(prefix="vz-edge-") as folder:
        log = Path(folder) / "tegrastats.log"
        try:
            process = subprocess.Popen(
                [command, "--interval", str(POLL_MS), "--logfile", str(log)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except OSError:
            yield peak
            return
        try:
            yield peak
        finally:
            process.terminate()
            process.wait()
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            peak.bytes = ram_peak_bytes(text)


def ram_peak_bytes(log: str) -> int | None:
    """The largest "RAM" of tegrastats' lines, in bytes; None where there is none."""
    return max((int(used) << 20 for used in RAM.findall(log)), default=None)
