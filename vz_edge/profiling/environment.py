"""Where a measurement was made: hardware, versions, and how busy the machine was.

A number without these cannot be compared with anything.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vz_edge import __version__
from vz_edge.device import nvml
from vz_edge.device.doctor.packages import installed_version
from vz_edge.device.machine import l4t_release, query_power_mode

RUN_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "pillow", "tokenizers")
TORCH_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate")  # of bundles with bitsandbytes weights
BUSY_WINDOW_SEC = 2.0
VECTOR_EXTENSIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm")


@dataclass(frozen=True)
class Environment:
    """The machine and its software.

    ``cpu`` names the vector extensions too, which decide the speed of quantised matrix products; ``cores`` are
    logical. ``board`` and ``power_mode`` are a Jetson's, None elsewhere; ``gpus`` is empty where NVML is missing.
    """

    cpu: str
    cores: int
    memory_gb: float
    gpus: tuple[str, ...]
    board: str | None
    power_mode: str | None
    system: str
    versions: dict[str, str]


def environment(packages: Sequence[str] = RUN_PACKAGES) -> Environment:
    """This machine, with the versions of vz-edge, of Python and of those ``packages`` that are installed."""
    is_jetson = l4t_release() is not None
    versions = {"vz-edge": __version__, "python": platform.python_version()}
    versions |= {name: version for name in packages if (version := installed_version(name))}
    return Environment(
        cpu=_cpu_model(),
        cores=os.cpu_count() or 1,
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        gpus=tuple(nvml.gpu_names()),
        board=_board() if is_jetson else None,
        power_mode=" ".join((query_power_mode() or "").split()) or None if is_jetson else None,
        system=f"{platform.system()} {platform.release()}",
        versions=versions,
    )


def busy_percent(window_sec: float = BUSY_WINDOW_SEC) -> float:
    """Share of the processors that something else uses right now, in percent: call it before anything is measured."""
    before = _cpu_ticks()
    time.sleep(window_sec)
    after = _cpu_ticks()
    idle, total = (after[part] - before[part] for part in range(2))
    return round(100 * (1 - idle / total), 1) if total else 0.0


def _cpu_ticks() -> tuple[int, int]:
    """Idle and total ticks of all processors since the start (proc_stat(5); guests are counted in user time)."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return ticks[3] + ticks[4], sum(ticks[:8])


def _cpu_model() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return " ".join([name, *(flag for flag in VECTOR_EXTENSIONS if flag in flags)])


def _board() -> str | None:
    try:
        return Path("/proc/device-tree/model").read_text(encoding="utf-8").rstrip("\0").strip()
    except OSError:
        return None
