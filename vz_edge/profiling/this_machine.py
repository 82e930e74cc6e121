"""This machine's processor as a device that plans can be made for: measured once, kept in the user's cache folder.

The profile lies in ``vz-edge/IDENTITY/this.yaml`` below ``$XDG_CACHE_HOME`` (``~/.cache``; XDG Base Directory
Specification). The identity stands for processor, threads, memory and onnxruntime's version: on another machine that
shares the folder, or after an upgrade, it is another one, and the machine is measured anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import yaml

from vz_edge.device.machine import meminfo_bytes, memory_limit_bytes
from vz_edge.device.runtime import physical_cores
from vz_edge.errors import DeviceError
from vz_edge.planning.devices import DeviceProfile, parse_device, parse_text
from vz_edge.profiling.environment import environment
from vz_edge.profiling.processor import device_profile, measure_processor

NAME = "this"
MOST_BUSY_PERCENT = 20.0
HEADER = """\
# This machine's processor, measured by 'vz-edge doctor --measure' (a GPU is not measured).
# As a board of your own: save it under another name, and write that name in the next line.
"""


def this_machine(measure: bool, announce: Callable[[str], None]) -> DeviceProfile:
    """The profile kept for this machine; measured and kept if there is none, or with ``measure``.

    ``announce`` is told what takes time. Raises DeviceError where a figure is impossible, DependencyError.
    """
    path = profile_path()
    if not measure and path.is_file():
        try:
            return parse_device(path)
        except DeviceError:
            announce(f"{path} is no profile that this version reads")
    return parse_text(measure_this_machine(announce), path)


def measure_this_machine(announce: Callable[[str], None]) -> str:
    """Measure, keep the profile where that is possible, and return its text. Raises as ``this_machine``."""
    announce("measuring this machine's processor for about ten seconds; other programs disturb it")
    speed = measure_processor(physical_cores())
    if speed.busy_percent > MOST_BUSY_PERCENT:
        announce(f"{speed.busy_percent:g} % of the processors were busy before: measure again on an idle machine")
    text = HEADER + yaml.safe_dump(device_profile(NAME, speed), sort_keys=False, width=110, allow_unicode=True)
    machine = environment()
    if machine.gpus or machine.board:
        announce("a GPU is not measured: plan it by its profile ('vz-edge devices')")
    path = profile_path()
    parse_text(text, path)  # what cannot be is not kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        announce(f"kept in {path}")
    except OSError as error:
        announce(f"not kept: {path} cannot be written ({error.strerror})")
    return text


def profile_path() -> Path:
    """Where the profile of this machine is kept."""
    machine = environment()
    runtime = [version for name, version in machine.versions.items() if name.startswith("onnxruntime")]
    facts = (machine.cpu, physical_cores(), meminfo_bytes().get("MemTotal"), memory_limit_bytes(), runtime)
    identity = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    home = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return cache / "vz-edge" / identity / f"{NAME}.yaml"
