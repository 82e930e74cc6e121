"""Memory of a process as the kernel counts it: proc(5), mincore(2).

Pages of memory-mapped files count as resident, as they do for a user who looks. Proportional set size (PSS) shares a
page's bytes among the processes that map it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

RESET_PEAK = "5"  # proc_pid_clear_refs(5): sets VmHWM to what is resident now, since Linux 4.0


def memory_bytes(pid: int | str = "self") -> dict[str, int]:
    """VmHWM, VmRSS, RssAnon and RssFile of a process in bytes; empty where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    wanted = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    return {name: int(fields[name].split()[0]) * 1024 for name in wanted if name in fields}


def reset_peak() -> bool:
    """Let this process's VmHWM start anew; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def pss_bytes() -> int | None:
    """Proportional set size of this process; None where the kernel does not tell (before Linux 4.14)."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), None)


def cached_share(files: Iterable[Path]) -> float | None:
    """Share of the files' pages that lie in the page cache; None where the kernel does not tell.

    It tells only those who could write to a file; others it answers that all pages are there (mincore(2)).
    """
    present = total = 0
    for path in files:
        if path.stat().st_size == 0:
            continue
        if not os.access(path, os.W_OK):
            return None
        pages = _pages_in_memory(path)
        present, total = present + int(np.count_nonzero(pages & 1)), total + len(pages)
    return present / total if total else None


def _pages_in_memory(path: Path) -> np.ndarray:
    """The vector that mincore gives for a whole file: uint8 [pages], the lowest bit set where the page is in memory."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        vector = np.zeros(-(-len(view) // mmap.PAGESIZE), dtype=np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view)), ctypes.c_void_p(vector.ctypes.data)
        )
        del view  # or the mapping could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return vector
