"""What this machine is: its memory, the limits that a container puts on it, and a Jetson's L4T and power mode.

Facts out of the system's files and commands, for whoever needs them; what they mean is said elsewhere. ``root`` is
where the files lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vz_edge.device.process import command_output

RELEASE_FILE = Path("etc/nv_tegra_release")
RELEASE = re.compile(r"R(\d+) \(release\), REVISION: ([\d.]+)")


def l4t_release(root: Path = Path("/")) -> str | None:
    """The L4T release, as "36.4.3"; "" where the file says something else, None on a machine that is no Jetson."""
    try:
        text = (root / RELEASE_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = RELEASE.search(text)
    return f"{match[1]}.{match[2]}" if match else ""


def query_power_mode() -> str | None:
    """What ``nvpmodel -q`` prints, None where it is missing or fails."""
    return command_output("nvpmodel", "-q") or command_output("/usr/sbin/nvpmodel", "-q")


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


def memory_left_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that the control group (version 1 or 2) still grants, None without a limit.

    Pages of files count as free: they are given up before an allocation fails. Sources: the kernel's
    admin-guide/cgroup-v2.rst (memory.max, memory.current, memory.stat) and admin-guide/cgroup-v1/memory.rst.
    """
    left = []
    for folder in _control_groups(root, "memory"):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        if limit and limit[0].isdigit():
            used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes") or ["0"]
            words = _words(folder / "memory.stat")
            stat = dict(zip(words[::2], words[1::2], strict=False))
            # Version 1 has those of the groups below under other names.
            files = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("active_file", "inactive_file"))
            left.append(max(0, int(limit[0]) - max(0, int(used[0]) - files)))
    return min(left, default=None)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs that the control group (version 1 or 2) grants, None without a limit."""
    quotas = []
    for folder in _control_groups(root, "cpu"):
        words = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


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
