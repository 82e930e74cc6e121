"""What one check of ``vz-edge doctor`` found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem"]
Need = Literal["export", "run", "both"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    ``problem``: what ``needed_for`` names will not work until ``fix`` (one line) is done; ``warning``: it works, but
    slower, with less room, or with a part missing that vz-edge can do without.
    """

    name: str
    state: State
    detail: str
    fix: str = ""
    needed_for: Need = "both"


def reasons_against(findings: Iterable[Finding], purpose: Literal["export", "run"]) -> list[str]:
    """``name: detail`` of each problem that stands in the way of ``purpose``; empty where it will work."""
    return [
        f"{finding.name}: {finding.detail}"
        for finding in findings
        if finding.state == "problem" and finding.needed_for in (purpose, "both")
    ]
