"""Memory, disk and threads, and the limits that a container puts on them."""

from __future__ import annotations

import shutil
from pathlib import Path

from vz_edge.device.doctor.finding import Finding
from vz_edge.device.machine import meminfo_bytes, memory_left_bytes, memory_limit_bytes

# llava-1.5-7b at 4 bits for the CPU, the smallest real bundle: 'vz-edge inspect llava-1.5-7b'.
SMALLEST_BUNDLE_BYTES = 5_115_463_680


def memory_finding(root: Path = Path("/")) -> Finding:
    """Total and available memory (/proc/meminfo), no more than the control group allows."""
    known = meminfo_bytes(root)
    total, available = known.get("MemTotal"), known.get("MemAvailable")
    if total is None or available is None:
        return Finding("memory", "warning", "/proc/meminfo does not tell it", "check it with 'free -h'")
    limit = memory_limit_bytes(root)
    group = ""
    if limit is not None and limit < total:
        total, available = limit, min(available, memory_left_bytes(root) or 0)
        group = ", limited by the container's control group"
    detail = f"{_gigabytes(available)} available of {_gigabytes(total)}{group}"
    if available < SMALLEST_BUNDLE_BYTES:
        detail += f"; a 7B at 4 bits has {_gigabytes(SMALLEST_BUNDLE_BYTES)} of weights"
        return Finding("memory", "warning", detail, "end other programs, or take a smaller model ('vz-edge plan')")
    return Finding("memory", "ok", detail)


def disk_finding(folder: Path = Path(".")) -> Finding:
    """Free space where a bundle would be written without ``--out``."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("disk", "warning", f"the current folder cannot be read ({error.strerror})", "change to another")
    detail = f"{_gigabytes(free)} free in the current folder"
    if free < SMALLEST_BUNDLE_BYTES:
        detail += f"; a 7B at 4 bits takes {_gigabytes(SMALLEST_BUNDLE_BYTES)}"
        return Finding("disk", "warning", detail, "free some, or keep bundles elsewhere (--out)")
    return Finding("disk", "ok", detail)


def threads_finding(cores: int, allowed: int, present: int, quota: float | None) -> Finding:
    """``cores``: physical ones this process may use, what ``vz-edge run`` takes as threads; ``quota`` in CPUs.

    ``allowed`` and ``present`` count logical CPUs. onnxruntime's threads spin while they wait (its default,
    "Thread management" in its documentation), so more of them than the quota throttles all.
    """
    detail = f"{cores} threads for {cores} physical cores; {allowed} of {present} CPUs allowed; waiting threads spin"
    if quota is None:
        return Finding("threads", "ok", detail, needed_for="run")
    detail += f"; the control group grants {quota:g} CPUs"
    if quota < cores:
        fix = f"vz-edge run --threads {max(1, int(quota))}, or raise the container's CPU quota"
        return Finding("threads", "warning", detail, fix, "run")
    return Finding("threads", "ok", detail, needed_for="run")


def omp_finding(value: str | None, cores: int) -> Finding:
    """OMP_NUM_THREADS: torch obeys it while exporting, onnxruntime's wheels do not."""
    name = "OMP_NUM_THREADS"
    if value is None:
        return Finding(name, "ok", "not set", needed_for="export")
    first = value.split(",")[0].strip()
    if first.isdigit() and int(first) >= cores:
        return Finding(name, "ok", value, needed_for="export")
    detail = f"{value}: exporting uses no more threads than that, of {cores} cores; running ignores it"
    return Finding(name, "warning", detail, "unset OMP_NUM_THREADS", "export")


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
