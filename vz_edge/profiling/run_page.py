"""A run's report as one HTML file: no script, no other file, opens from a disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vz_edge.pages import render
from vz_edge.pages.bars import Piece, stack
from vz_edge.profiling.run_report import STAGES, BundleRun, RunReport
from vz_edge.profiling.run_table import TIME_LABELS, digits, rows, title

TEMPLATE = "run_page.html.jinja"
BAR_WIDTH = 600  # SVG units of the longest bar of a chart
TTFT_PARTS = ("preprocess_sec", "vision_sec", "prefill_sec")


@dataclass(frozen=True)
class Bar:
    """One line of a chart, and the whole as text."""

    label: str
    total: str
    pieces: tuple[Piece, ...]
    predicted: bool = False


@dataclass(frozen=True)
class Chart:
    """Bars of one quantity, drawn to one scale."""

    title: str
    bars: tuple[Bar, ...]


def page(report: RunReport) -> str:
    """The whole page."""
    return render(
        TEMPLATE,
        report=report,
        rows=rows(report),
        titles=[title(run) for run in report.bundles],
        charts=[
            _chart("Time to first token", "s", 1, _first_token_bars(report.bundles)),
            _chart("Memory by stage", "GB", 1e9, _memory_bars(report.bundles)),
            _chart("Decode", "tokens/s", 1, _decode_bars(report.bundles)),
        ],
        bar_width=BAR_WIDTH,
    )


class _Values(NamedTuple):
    """A bar before it is scaled. ``total`` is the whole's own median, which need not be the sum of the parts'."""

    label: str
    total: float
    parts: list[tuple[str, float]]
    predicted: bool


def _first_token_bars(runs: Iterable[BundleRun]) -> Iterator[_Values]:
    for run in runs:
        parts = [(TIME_LABELS[name], run.times[name].median) for name in TTFT_PARTS]
        yield _Values(run.bundle, run.times["ttft_sec"].median, parts, False)
        if run.predicted:
            times = run.predicted.times
            parts = [(TIME_LABELS[name], times[name]) for name in TTFT_PARTS if name in times]
            yield _Values(f"predicted for {run.predicted.device}", sum(value for _, value in parts), parts, True)


def _memory_bars(runs: Iterable[BundleRun]) -> Iterator[_Values]:
    for run in runs:
        for stage in STAGES:
            yield _whole(f"{run.bundle}, {stage}", run.memory[stage][run.deciding_kind].median, False)
            if run.predicted and stage in run.predicted.memory:
                yield _whole(f"{stage}, predicted for {run.predicted.device}", run.predicted.memory[stage], True)


def _decode_bars(runs: Iterable[BundleRun]) -> Iterator[_Values]:
    name = "decode_tokens_per_sec"
    for run in runs:
        yield _whole(run.bundle, run.times[name].median, False)
        if run.predicted and name in run.predicted.times:
            yield _whole(f"predicted for {run.predicted.device}", run.predicted.times[name], True)


def _whole(label: str, value: float, predicted: bool) -> _Values:
    """A bar of one part."""
    return _Values(label, value, [(label, value)], predicted)


def _chart(title: str, unit: str, scale: float, values: Iterable[_Values]) -> Chart:
    drawn = list(values)
    longest = max(sum(value for _, value in bar.parts) for bar in drawn)
    bars = []
    for bar in drawn:
        parts = enumerate(bar.parts)
        titled = [(f"p{n}", value, f"{name} {digits(value / scale)} {unit}") for n, (name, value) in parts]
        pieces, _ = stack(0, BAR_WIDTH / longest, titled)
        bars.append(Bar(bar.label, f"{digits(bar.total / scale)} {unit}", pieces, bar.predicted))
    return Chart(title, tuple(bars))
