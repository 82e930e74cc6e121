"""``vz-edge devices``: the boards and cards that plans can be made for."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every figure's source.")] = False,
) -> None:
    """List the devices that --device knows by name."""
    from vz_edge.planning.devices import device_names, load_device

    devices = sorted((load_device(name) for name in device_names()), key=lambda device: device.app_memory_bytes.value)
    if as_json:
        print(json.dumps([dataclasses.asdict(device) for device in devices], indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "device", "GB", "for an app", "GB/s", "TFLOP/s", "CUDA", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for device in devices:
        capability = device.compute_capability
        table.add_row(
            device.name,
            device.title,
            f"{device.memory_bytes.value / 1e9:.1f}",
            f"{device.app_memory_bytes.value / 1e9:.1f}",
            f"{device.bandwidth_bytes_per_sec.value / 1e9:,.0f}",
            f"{device.peak('fp32' if device.device_class == 'cpu' else 'fp16_fp32acc') / 1e12:.4g}",
            "-" if capability is None else f"{capability.value:.1f}",
        )
    console = Console()
    console.print(table)
    console.print("GB are 1e9 bytes; TFLOP/s are dense: fp16 added up in fp32, on a processor fp32 as measured.")
    console.print("A device of your own: give --device the path of a profile like those (--json shows their figures).")
