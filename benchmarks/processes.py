"""Peak memory and time of a command.

Peak resident memory of a command is the kernel's high-water mark (``VmHWM``, which forgets nothing between two
polls) of the largest process of its tree. Pages of memory-mapped files count as resident, as they do for a user who
looks. Readings are not summed over the tree, since a process and its fork share pages, and ``ru_maxrss`` is not used,
since a process inherits the mark of the one that started it.

Rivals that are measured in turn run in workers (vz_edge.profiling.processes).
"""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vz_edge.profiling.process_memory import memory_bytes

POLL_SEC = 0.02


@dataclass(frozen=True)
class Run:
    """One finished command. ``cpu_sec`` is processor time, its children's too; it suffers less from neighbours."""

    wall_sec: float
    cpu_sec: float
    peak_bytes: int


def run_measured(command: Sequence[str], log: Path) -> Run:
    """Run ``command`` with its output in ``log``; exit with the log's end where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    cpu_before_sec = _children_cpu_sec()
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        peak_bytes = 0
        while process.poll() is None:
            peak_bytes = max(peak_bytes, _tree_peak_bytes(process.pid))
            time.sleep(POLL_SEC)
    wall_sec = time.perf_counter() - start
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}:\n{tail}")
    return Run(wall_sec, _children_cpu_sec() - cpu_before_sec, peak_bytes)


def _children_cpu_sec() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _tree_peak_bytes(pid: int) -> int:
    return max((memory_bytes(process).get("VmHWM", 0) for process in _tree(pid)), default=0)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in children:
        yield from _tree(int(child))
