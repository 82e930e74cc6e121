"""``vz-edge devices``: the boards and cards that plans can be made for."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer


def command(
    name: Annotated[str | None, typer.Argument(help="One of them, with the source of every figure.")] = None,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="Print the profile's file, to start one of a board of your own.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every figure's source.")] = False,
) -> None:
    """List the devices that --device knows by name, or show one."""
    from vz_edge.cli.planned import THIS_MACHINE
    from vz_edge.errors import RequestError
    from vz_edge.planning.devices import device_names, load_device

    if name in THIS_MACHINE:
        raise RequestError("the profile of this machine is measured and printed by 'vz-edge doctor --measure'")
    if name is not None:
        _show(name, as_yaml, as_json)
        return
    if as_yaml:
        raise RequestError("--yaml prints one profile; name it, such as 'vz-edge devices orin-nx-16 --yaml'")
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
    console.print(
        "A device of your own: vz-edge devices orin-nx-16 --yaml > my-board.yaml, change it, and give --device"
    )
    console.print("its path. This machine: --device this, which measures it once (vz-edge doctor --measure).")


def _show(name: str, as_yaml: bool, as_json: bool) -> None:
    from vz_edge.planning.devices import load_device, profile_text
    from vz_edge.planning.plan_text import sources

    device = load_device(name)
    if as_yaml:
        print(profile_text(name), end="")
    elif as_json:
        print(json.dumps(dataclasses.asdict(device), indent=2))
    else:
        print(f"{device.name}: {device.title} ({device.device_class})")
        for figure, value, source in sources(device):
            print(f"  {figure}: {value} ({source})")
