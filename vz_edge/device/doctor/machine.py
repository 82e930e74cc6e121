"""Memory, disk and threads, and the limits that a container puts on them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from vz_edge.device.doctor.finding import Finding

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
        total, available = limit, min(available, limit)
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


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs that the control group (version 1 or 2) grants, None without a limit."""
    quotas = []
    for folder in _control_groups(root, "cpu"):
        words = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def meminfo_bytes(root: Path = Path("/")) -> dict[str, int]:
    """What /proc/meminfo (proc(5)) says in kB, by its key; empty where it cannot be read."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        return {words[0].rstrip(":"): int(words[1]) * 1024 for words in map(str.split, lines) if words[2:] == ["kB"]}
    except (OSError, ValueError):
        return {}


def memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that the control group (version 1 or 2) allows, None without a limit."""
    limits = []
    for folder in _control_groups(root, "memory"):
        words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        limits += [int(word) for word in words if word.isdigit()]
    return min(limits, default=None)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group and those above it, whose limits hold too; cgroups(7) gives the format."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = mount / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
