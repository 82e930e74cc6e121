"""``vz-edge doctor``: what this machine can run, what is wrong, and how to put it right."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vz_edge.device.doctor import Finding

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def command(
    measure: Annotated[
        bool, typer.Option("--measure", help="Instead: measure this processor and print its device profile.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what this machine can run, with a fix for each problem.

    Tries what can break instead of asking for versions: a session on every provider of onnxruntime, a 4-bit product on
    it, a 4-bit kernel of bitsandbytes if that is installed. Nothing is written or installed.

    Exit status: 0 if running bundles will work and, where torch and transformers are both installed, exporting too;
    2 otherwise. A warning never changes it. CUDA must work where there is an NVIDIA GPU and onnxruntime was built
    for it; a build for the CPU beside a GPU is a warning.

    --measure prints a profile of this machine's processor (.yaml) for plans, and keeps it for 'plan --device this'.
    """
    if measure:
        _measure(as_json)
        return
    from vz_edge.device.doctor import diagnose, guarded, reasons_against
    from vz_edge.device.doctor.packages import export_is_expected
    from vz_edge.host.doctor import bitsandbytes_findings

    findings: list[Finding] = []
    if as_json:
        findings = [*diagnose(), *guarded("bitsandbytes", bitsandbytes_findings)]
    else:
        from rich.console import Console

        from vz_edge.cli.verbosity import is_quiet

        with Console(stderr=True, quiet=is_quiet()).status("") as status:
            for finding in diagnose():
                status.update(f"{finding.name} checked")
                findings.append(finding)
            findings += guarded("bitsandbytes", bitsandbytes_findings)
    against = {"running": reasons_against(findings, "run"), "exporting": reasons_against(findings, "export")}
    if as_json:
        verdicts = {what: {"will_work": not reasons, "reasons": reasons} for what, reasons in against.items()}
        print(json.dumps({"findings": [dataclasses.asdict(finding) for finding in findings], **verdicts}, indent=2))
    else:
        _print(findings, against)
    if against["running"] or (against["exporting"] and export_is_expected()):
        raise typer.Exit(2)


def _measure(as_json: bool) -> None:
    from pathlib import Path

    from vz_edge.cli.planned import announce
    from vz_edge.planning.devices import parse_text
    from vz_edge.profiling.this_machine import NAME, measure_this_machine

    text = measure_this_machine(announce)
    if as_json:
        print(json.dumps(dataclasses.asdict(parse_text(text, Path(f"{NAME}.yaml"))), indent=2))
    else:
        print(text, end="")


def verdict(what: str, reasons: list[str]) -> str:
    """One line: ``what`` will work, or why not."""
    return f"{what} will not work: {'; '.join(reasons)}" if reasons else f"{what} will work"


def _print(findings: list[Finding], against: dict[str, list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "", "found", box=box.SIMPLE_HEAD, pad_edge=False)
    for finding in findings:
        found = Text(finding.detail)
        if finding.state != "ok":
            found.append(f"\nfix: {finding.fix}", style="italic")
        table.add_row(finding.name, Text(finding.state, style=STYLES[finding.state]), found)
    Console().print(table)
    for what, reasons in against.items():
        print(verdict(what, reasons))
