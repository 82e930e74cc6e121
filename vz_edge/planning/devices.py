"""Devices: what a board or a card can do, as data (``profiles/*.yaml``).

A profile holds memory, bandwidth and dense peaks, and for each number where it was read or how it was derived.
It is parsed strictly, and a figure that no device of its class can have is refused: vendors print sparse peaks,
accelerators that a graph does not run on, and bits for bytes, and a plan made with those is wrong by factors.

A user adds a board by writing a file: ``load_device("my-board.yaml")``.

>>> load_device("agx-orin-64").bandwidth_bytes_per_sec.value
204800000000.0
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from os.path import isfile
from pathlib import Path
from typing import Literal

import yaml

from vz_edge import strict
from vz_edge.errors import DeviceError
from vz_edge.recipe import data_folder

DeviceClass = Literal["jetson", "geforce", "datacentre", "cpu"]
Peak = Literal["fp32", "fp16_fp32acc", "fp16_fp16acc", "int8"]

# (lowest, highest) by class: the smallest and the largest product known, with room for the next generation or two.
BANDWIDTH_RANGE: dict[str, tuple[float, float]] = {
    "jetson": (20e9, 1e12),
    "geforce": (100e9, 4e12),
    "datacentre": (200e9, 2e13),
    "cpu": (2e8, 2e12),  # as reached by 4-bit products, which a small core does slower than its bus
}
MEMORY_RANGE: dict[str, tuple[float, float]] = {
    "jetson": (2 * 2**30, 512 * 2**30),
    "geforce": (4 * 2**30, 128 * 2**30),
    "datacentre": (8 * 2**30, 1024 * 2**30),
    "cpu": (2**29, 2**44),
}
PEAK_RANGE: dict[str, tuple[float, float]] = {
    "jetson": (2e11, 2e15),
    "geforce": (2e12, 5e15),
    "datacentre": (1e13, 2e16),
    "cpu": (1e9, 5e14),
}
LEAST_APP_SHARE = 0.1  # of the memory; less is a figure in other units
CAPABILITY_RANGE = (5.0, 20.0)


@dataclass(frozen=True)
class Figure:
    """A number and where it is from: a source, or "derived: formula", or "measured: command"."""

    value: float
    source: str


@dataclass(frozen=True)
class ByteCount:
    """A number of bytes and where it is from."""

    value: int
    source: str


@dataclass(frozen=True)
class Peaks:
    """Dense matrix products, FLOP/s (int8: operations/s), a multiply-add counted as two; None: the source has none.

    fp16 tensor cores add up in fp32 or in fp16; GeForce cards halve the first. ``fp32`` is for processors.
    """

    fp32: Figure | None = None
    fp16_fp32acc: Figure | None = None
    fp16_fp16acc: Figure | None = None
    int8: Figure | None = None


@dataclass(frozen=True)
class DeviceProfile:
    """One file of ``profiles/``.

    ``memory_bytes`` is the device's memory, ``app_memory_bytes`` what an application can really have of it;
    ``unified_memory``: processor and GPU share it. ``compute_capability`` is CUDA's, None for a processor.
    """

    name: str
    title: str
    device_class: DeviceClass
    unified_memory: bool
    memory_bytes: ByteCount
    app_memory_bytes: ByteCount
    bandwidth_bytes_per_sec: Figure
    peaks_flops_per_sec: Peaks
    compute_capability: Figure | None = None

    def peak(self, name: Peak) -> float:
        """The peak of that name in FLOP/s. Raises DeviceError where the profile has none."""
        figure: Figure | None = getattr(self.peaks_flops_per_sec, name)
        if figure is None:
            raise DeviceError(f"{self.name} has no peaks_flops_per_sec.{name}, which this runtime needs; add it")
        return figure.value


def device_names() -> list[str]:
    """Names of the devices that ship with this version, sorted."""
    return sorted(path.stem for path in data_folder("profiles").glob("*.yaml"))


def load_device(name_or_path: str | Path) -> DeviceProfile:
    """A device that ships with this version, or the one in a user's YAML file. Raises DeviceError."""
    name = str(name_or_path)
    if name in device_names():
        return parse_device(data_folder("profiles") / f"{name}.yaml")
    path = Path(name_or_path)
    if isfile(path):  # which says no of what is no path at all
        return parse_device(path)
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise DeviceError(f"{name} does not exist; expected a device profile ('vz-edge devices' lists those by name)")
    near = difflib.get_close_matches(name, device_names(), n=3, cutoff=0.4)
    nearest = f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(device_names())}"
    raise DeviceError(f"no device '{name}'; {nearest}, or give 'this' machine, or the path of a profile of your own")


def profile_text(name: str) -> str:
    """The file of a profile that ships with this version, or a user's, with a line about how to make it another's.

    Raises DeviceError.
    """
    load_device(name)
    path = data_folder("profiles") / f"{name}.yaml" if name in device_names() else Path(name)
    first = "# To start a board of your own: save this as NAME.yaml, write NAME into 'name', and correct each figure.\n"
    return first + path.read_text(encoding="utf-8")


def parse_device(path: Path) -> DeviceProfile:
    """Parse one profile strictly and check its figures. Raises DeviceError naming file, key and allowed range."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise DeviceError(f"{path}: {' '.join(str(error).split())}") from error
    return parse_text(text, path)


def parse_text(text: str, path: Path) -> DeviceProfile:
    """Parse the text of the profile ``path`` and check its figures. Raises DeviceError as ``parse_device``."""
    try:
        profile = strict.load(DeviceProfile, yaml.safe_load(text))
    except (strict.SchemaError, yaml.YAMLError) as error:
        raise DeviceError(f"{path}: {' '.join(str(error).split())}") from error
    if profile.name != path.stem:
        raise DeviceError(f"{path}: name is '{profile.name}', expected '{path.stem}' as the file is called")
    _check_figures(path, profile)
    return profile


def _check_figures(path: Path, profile: DeviceProfile) -> None:
    kind = profile.device_class
    memory = profile.memory_bytes
    _check(path, "memory_bytes", memory, MEMORY_RANGE[kind], kind)
    app_range = (LEAST_APP_SHARE * memory.value, float(memory.value))
    _check(path, "app_memory_bytes", profile.app_memory_bytes, app_range, f"{kind} with that memory_bytes")
    _check(path, "bandwidth_bytes_per_sec", profile.bandwidth_bytes_per_sec, BANDWIDTH_RANGE[kind], kind)
    for field in fields(Peaks):
        figure = getattr(profile.peaks_flops_per_sec, field.name)
        if figure is not None:
            _check(path, f"peaks_flops_per_sec.{field.name}", figure, PEAK_RANGE[kind], kind)
    needed = ("fp32", "int8") if kind == "cpu" else ("fp16_fp32acc", "fp16_fp16acc")
    for name in needed:
        if getattr(profile.peaks_flops_per_sec, name) is None:
            raise DeviceError(f"{path}: peaks_flops_per_sec.{name}: missing; a {kind} needs it")
    if kind != "cpu":
        if profile.compute_capability is None:
            raise DeviceError(f"{path}: compute_capability: missing; a {kind} needs it (8.7 for Jetson Orin)")
        _check(path, "compute_capability", profile.compute_capability, CAPABILITY_RANGE, kind)


def _check(path: Path, key: str, figure: Figure | ByteCount, allowed: tuple[float, float], what: str) -> None:
    low, high = allowed
    if not low <= figure.value <= high:
        raise DeviceError(
            f"{path}: {key} is {figure.value:.4g}, impossible for a {what}; expected {low:.4g} to {high:.4g}"
        )
    if not figure.source.strip():
        raise DeviceError(f"{path}: {key}.source is empty; say where the number is from, or 'derived: ' and how")
