"""Writing a benchmark down: what ran, on what, what came out, and whether it met the bar.

A report is one JSON file with every sample and one Markdown file with a table to read: medians, and in
brackets the smallest and the largest sample. Both name the command, the versions and the hardware, since a
number without these cannot be compared with anything.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import operator
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vz_edge.profiling.environment import Environment, environment
from vz_edge.profiling.run_table import digits

REPORTS = Path("profiles/reports")
PACKAGES = (
    *("torch", "transformers", "bitsandbytes", "numpy"),
    *("onnxruntime", "onnxruntime-genai", "onnx-ir", "llama-cpp-python"),
)
GB = 1e9


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one quantity; the table shows the median and the range."""

    values: tuple[float, ...]
    unit: str

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        """Median, unit and range."""
        middle = f"{digits(self.median)} {self.unit}".rstrip()
        if len(self.values) == 1:
            return middle
        return f"{middle} ({digits(min(self.values))}–{digits(max(self.values))})"


@dataclass(frozen=True)
class Bar:
    """A bar that the measurement has to reach."""

    what: str
    value: float
    relation: Literal["<=", ">="]
    limit: float
    unit: str

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the limit."""
        return (operator.le if self.relation == "<=" else operator.ge)(self.value, self.limit)


Cell = str | Samples


@dataclass(frozen=True)
class Report:
    """One benchmark's outcome. Each row is a mapping of column to cell; all rows have the same columns.

    ``busy_percent`` is what ``vz_edge.profiling.environment.busy_percent`` said before the first measurement.
    """

    name: str
    title: str
    busy_percent: float
    notes: Sequence[str]
    rows: Sequence[dict[str, Cell]]
    bars: Sequence[Bar] = ()
    settings: dict[str, str | int | float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``<name>.json`` and ``<name>.md`` into ``folder`` and print the latter."""
        folder.mkdir(parents=True, exist_ok=True)
        machine = environment(PACKAGES)
        facts = {"command": command_line(), "date": datetime.date.today().isoformat()}
        bars = [dataclasses.asdict(bar) | {"met": bar.met} for bar in self.bars]
        data = dataclasses.asdict(self) | {"bars": bars} | facts | {"environment": dataclasses.asdict(machine)}
        encoded = json.dumps(data, indent=2, ensure_ascii=False)
        (folder / f"{self.name}.json").write_text(encoded + "\n", encoding="utf-8")
        text = self._markdown(machine, facts["command"], facts["date"])
        (folder / f"{self.name}.md").write_text(text, encoding="utf-8")
        print(text, flush=True)

    def _markdown(self, machine: Environment, command: str, date: str) -> str:
        columns = list(self.rows[0])
        versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
        lines = [f"# {self.title}", "", f"`{command}`, {date}", ""]
        lines += [f"{machine.cpu}, {machine.cores} cores, {machine.memory_gb} GB of memory; {versions}", ""]
        lines += [f"Other processes used {self.busy_percent:g} % of the processors when it started.", ""]
        lines += [_row(columns), _row(["---"] * len(columns))]
        lines += [_row([str(row[column]) for column in columns]) for row in self.rows]
        if self.bars:
            lines += ["", _row(["bar", "measured", "limit", "met"]), _row(["---"] * 4)]
            for bar in self.bars:
                limit = f"{'at most' if bar.relation == '<=' else 'at least'} {bar.limit:g} {bar.unit}"
                met = "yes" if bar.met else "**no**"
                lines.append(_row([bar.what, f"{digits(bar.value)} {bar.unit}", limit, met]))
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), ""])


def command_line() -> str:
    """The command that is running, as a reader would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else f"benchmarks.{Path(sys.argv[0]).stem}"
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
