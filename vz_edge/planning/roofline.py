"""From work to seconds: a roofline (Williams et al., CACM 2009) with the efficiency that runtimes really reach.

A stage takes as long as the slowest of three things that overlap: computing at a share of the device's peak, moving
bytes at a share of its bandwidth, and launching kernels. Weights that a runtime unpacks first cost the time to write
them, and are then read at 16 bits. A token that is written costs a fixed time more (sampling, the loop around it).

The shares are data, one file a runtime (``profiles/runtimes/*.yaml``), by class of device, each with the published
or own measurement it comes from. Where there is none the source says "assumed" and from what.

>>> board = load_device("agx-orin-64")
>>> decoder = load_recipe("llava-next-13b").model.decoder
>>> decode = decode_work(decoder, 512, weight_bytes=6_760_000_000, activation_bytes=2)
>>> 1 / token_sec(decode, 4, board, load_runtime("onnxruntime").efficiency("jetson"))
16.2...
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from vz_edge import strict
from vz_edge.errors import DeviceError
from vz_edge.planning.cost import Work
from vz_edge.planning.devices import DeviceClass, DeviceProfile, Figure, Peak
from vz_edge.recipe import data_folder


@dataclass(frozen=True)
class PeakShare:
    """The share of one of a device's peaks that matrix products reach, and its source."""

    peak: Peak
    share: float
    source: str


@dataclass(frozen=True)
class Efficiency:
    """What a runtime reaches on a class of device.

    ``linear`` is by bits of the weights ("16", "8", "4"), ``attention`` of products without weights;
    ``bandwidth_share`` of reading weights and cache; ``launch_sec`` a kernel; ``token_sec`` what a written token
    costs besides; ``pixel_sec`` a pixel of a tile in preprocessing; ``unpacked_bits`` at which bits weights are
    written out as 16-bit numbers before a product of more than one row.
    """

    linear: dict[str, PeakShare]
    attention: PeakShare
    bandwidth_share: Figure
    launch_sec: Figure
    token_sec: Figure
    pixel_sec: Figure | None = None
    unpacked_bits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Launches:
    """Kernels a layer launches, in the tower and in the decoder by bits of its weights, and how that was counted."""

    vision: int
    decoder: dict[str, int]
    source: str


@dataclass(frozen=True)
class Runtime:
    """One file of ``profiles/runtimes/``."""

    name: str
    title: str
    launches: Launches
    classes: dict[str, Efficiency] = field(default_factory=dict)

    def efficiency(self, device_class: DeviceClass) -> Efficiency:
        """What it reaches on such devices. Raises DeviceError where nothing is known of that."""
        if device_class not in self.classes:
            raise DeviceError(
                f"no figures of {self.name} on a device of class {device_class}; it has: {', '.join(self.classes)}"
            )
        return self.classes[device_class]


def runtime_names() -> list[str]:
    """Names of the runtimes that times can be predicted for, sorted."""
    return sorted(path.stem for path in (data_folder("profiles") / "runtimes").glob("*.yaml"))


@functools.cache
def load_runtime(name: str) -> Runtime:
    """The runtime of that name. Raises DeviceError, also where its file breaks the schema."""
    if name not in runtime_names():
        raise DeviceError(f"no runtime '{name}'; there are: {', '.join(runtime_names())}")
    return parse_runtime(data_folder("profiles") / "runtimes" / f"{name}.yaml")


def parse_runtime(path: Path) -> Runtime:
    """Parse one runtime's file strictly. Raises DeviceError naming the file, the key and the range."""
    try:
        runtime = strict.load(Runtime, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (strict.SchemaError, yaml.YAMLError) as error:
        raise DeviceError(f"{path}: {' '.join(str(error).split())}") from error
    for name, efficiency in runtime.classes.items():
        shares = {f"linear.{bits}": share.share for bits, share in efficiency.linear.items()}
        shares |= {"attention": efficiency.attention.share, "bandwidth_share": efficiency.bandwidth_share.value}
        for key, share in shares.items():
            # On processors a peak is itself a measurement, of one shape of product; another shape may be faster.
            highest = 1.5 if name == "cpu" else 1.0
            if not 0 < share <= highest:
                raise DeviceError(f"{path}: classes.{name}.{key} is {share}; expected more than 0, at most {highest}")
    return runtime


def stage_sec(work: Work, bits: int, device: DeviceProfile, efficiency: Efficiency, launches: int = 0) -> float:
    """Seconds that ``work`` takes with weights of ``bits`` bits; ``launches`` are kernels a layer."""
    linear = _share_of(efficiency, bits)
    compute_sec = work.linear_flops / (device.peak(linear.peak) * linear.share)
    compute_sec += work.attention_flops / (device.peak(efficiency.attention.peak) * efficiency.attention.share)
    bandwidth = device.bandwidth_bytes_per_sec.value * efficiency.bandwidth_share.value
    moving_sec = (work.unpacked_bytes + work.bytes_moved) / bandwidth
    launch_sec = work.layers * launches * efficiency.launch_sec.value
    return work.unpacked_bytes / bandwidth + max(compute_sec, moving_sec, launch_sec)


def token_sec(work: Work, bits: int, device: DeviceProfile, efficiency: Efficiency, launches: int = 0) -> float:
    """Seconds that one written token takes."""
    return stage_sec(work, bits, device, efficiency, launches) + efficiency.token_sec.value


def _share_of(efficiency: Efficiency, bits: int) -> PeakShare:
    if str(bits) not in efficiency.linear:
        raise DeviceError(f"no figures for {bits}-bit weights here; there are: {', '.join(efficiency.linear)}")
    return efficiency.linear[str(bits)]
