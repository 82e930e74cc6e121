"""A plan as one HTML file: what fits where, bars of memory against the limit and of time, and every figure's source."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vz_edge.pages import render
from vz_edge.pages.bars import Piece, stack
from vz_edge.planning.plan import Asked, Candidate, Row
from vz_edge.planning.plan_text import (
    digits,
    gigabytes,
    notes,
    runtime_sources,
    score_text,
    sources,
    verdicts,
)
from vz_edge.planning.roofline import load_runtime

TEMPLATE = "plan_page.html.jinja"
# Parts in the order in which they are stacked: name, label, style of page.css.
MEMORY_PARTS = {
    "decoder": ("decoder weights", "p0"),
    "lm_head": ("lm_head", "p5"),
    "token_table": ("token table", "p7"),
    "vision": ("vision and projector", "p1"),
    "kv_cache": ("KV cache", "p2"),
    "workspace": ("workspace", "p3"),
    "allocator": ("kept by the allocator", "p6"),
    "repacking": ("repacking", "p8"),
    "runtime": ("runtime", "p4"),
}
TIME_PARTS = {"preprocess": "p4", "vision": "p1", "prefill": "p0", "decode": "p2"}
KINDS = {"fits": "fits", "fits with less context": "less", "does not fit": "not"}

# SVG units: what a panel's bars are drawn within, and room for the text after the longest.
WIDTH, TOP, ROW = 1160, 38, 24
MEMORY_X, MEMORY_WIDTH = 250, 360
TIME_X, TIME_WIDTH = 700, 190
DECODE_X, DECODE_WIDTH = 970, 110
TEXT_GAP = 8
LIMIT_SHOWN = 1.6  # a limit that is further off than this many times the longest bar is written, not drawn


@dataclass(frozen=True)
class Text:
    """A figure after a bar."""

    x: float
    text: str


@dataclass(frozen=True)
class Bars:
    """One line of a drawing: a row's three bars. ``reference``: the vanilla 7B."""

    label: str
    y: int
    pieces: tuple[Piece, ...]
    totals: tuple[Text, ...]
    reference: bool


@dataclass(frozen=True)
class Panel:
    """A column of bars."""

    x: int
    title: str


@dataclass(frozen=True)
class Drawing:
    """All bars of a device. ``limit_x`` is None where the limit lies beyond the scale."""

    width: int
    height: int
    panels: tuple[Panel, ...]
    rows: tuple[Bars, ...]
    limit_x: float | None
    limit_text: str
    limit_text_x: float


@dataclass(frozen=True)
class Verdicts:
    """A row in words. ``kind`` is the style of its verdict."""

    label: str
    kind: str
    fit: str
    facts: str
    verdict: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class Board:
    """A device's part of the page."""

    name: str
    title: str
    anchor: str
    limit: str
    rows: tuple[Verdicts, ...]
    drawing: Drawing

    def cell(self, label: str) -> Verdicts | None:
        """The row of that label."""
        return next((row for row in self.rows if row.label == label), None)


@dataclass(frozen=True)
class Column:
    """A candidate over the table of all devices."""

    candidate: Candidate
    score: str


def page(rows: Sequence[Row], asked: Asked) -> str:
    """The whole page; the rows of a device follow each other."""
    columns = {row.candidate.label: Column(row.candidate, score_text(row)) for row in rows}
    boards = [_board(list(group)) for _, group in itertools.groupby(rows, key=lambda row: row.device)]
    drawn = [shown for row in rows for shown in (row, row.vanilla) if shown]
    parts = {part for row in drawn for part, size in row.memory.parts.items() if size}
    return render(
        TEMPLATE,
        notes=notes(rows, asked),
        columns=list(columns.values()),
        scores=any(row.score is not None for row in rows),
        boards=boards,
        legend={
            "memory": [entry for part, entry in MEMORY_PARTS.items() if part in parts],
            "time": list(TIME_PARTS.items()),
        },
        sources=list(_sources(rows, asked.runtime)),
    )


def _board(rows: Sequence[Row]) -> Board:
    device = rows[0].device
    return Board(
        device.name,
        device.title,
        f"on-{device.name}",
        gigabytes(device.app_memory_bytes.value),
        tuple(_verdicts(row) for row in rows),
        _drawing(rows),
    )


def _verdicts(row: Row) -> Verdicts:
    first, *others = verdicts(row)
    facts = f"{gigabytes(row.memory.peak_bytes)}, {digits(row.prediction.ttft_sec)} s"
    return Verdicts(row.candidate.label, KINDS[row.fit], row.fit, facts, first, tuple(others))


def _drawing(rows: Sequence[Row]) -> Drawing:
    labels = {row.candidate.label for row in rows}
    references = {row.vanilla.candidate.label: row.vanilla for row in rows if row.vanilla}
    shown = [(row, False) for row in rows]
    shown += [(row, True) for label, row in references.items() if label not in labels]
    limit = rows[0].device.app_memory_bytes.value
    longest_bytes = max(row.memory.peak_bytes for row, _ in shown)
    scale_bytes = max(longest_bytes, limit) if limit <= LIMIT_SHOWN * longest_bytes else longest_bytes
    longest_sec = max(row.prediction.ttft_sec for row, _ in shown)
    longest_token_sec = max(row.prediction.decode_sec_per_token for row, _ in shown)
    bars = []
    for number, (row, reference) in enumerate(shown):
        panels = (
            (stack(MEMORY_X, MEMORY_WIDTH / scale_bytes, _memory(row)), gigabytes(row.memory.peak_bytes)),
            (stack(TIME_X, TIME_WIDTH / longest_sec, _times(row)), f"{digits(row.prediction.ttft_sec)} s"),
            (stack(DECODE_X, DECODE_WIDTH / longest_token_sec, _decode(row)), _milliseconds(row)),
        )
        pieces = tuple(piece for (found, _), _ in panels for piece in found)
        totals = tuple(Text(round(end + TEXT_GAP, 1), total) for (_, end), total in panels)
        bars.append(Bars(row.candidate.label, TOP + ROW * number, pieces, totals, reference))
    drawn_limit = MEMORY_X + MEMORY_WIDTH * limit / scale_bytes if limit <= scale_bytes else None
    far = "" if drawn_limit else ", beyond this scale →"
    limit_text = f"limit {gigabytes(limit)}{far}"
    return Drawing(
        WIDTH,
        TOP + ROW * len(bars),
        (Panel(MEMORY_X, "memory"), Panel(TIME_X, "time to first token"), Panel(DECODE_X, "a token after it")),
        tuple(bars),
        round(drawn_limit, 1) if drawn_limit else None,
        limit_text,
        # Near the left edge of the panel the text would run into the labels.
        max(drawn_limit or MEMORY_X + MEMORY_WIDTH, MEMORY_X + 90),
    )


def _memory(row: Row) -> Iterator[tuple[str, float, str]]:
    for part, size in sorted(row.memory.parts.items(), key=lambda item: list(MEMORY_PARTS).index(item[0])):
        label, style = MEMORY_PARTS[part]
        yield style, size, f"{label} {size / 1e9:.2f} GB"


def _times(row: Row) -> Iterator[tuple[str, float, str]]:
    found = row.prediction
    seconds = {"preprocess": found.preprocess_sec, "vision": found.vision_sec, "prefill": found.prefill_sec}
    for stage, value in seconds.items():
        yield TIME_PARTS[stage], value, f"{stage} {digits(value)} s"


def _decode(row: Row) -> Iterator[tuple[str, float, str]]:
    rate = f"{digits(row.prediction.tokens_per_sec)} tokens/s"
    yield TIME_PARTS["decode"], row.prediction.decode_sec_per_token, rate


def _milliseconds(row: Row) -> str:
    return f"{digits(1e3 * row.prediction.decode_sec_per_token)} ms"


@dataclass(frozen=True)
class SourceGroup:
    """Figures of one device, runtime or model: name, value, source."""

    title: str
    figures: tuple[tuple[str, str, str], ...]


def _sources(rows: Sequence[Row], runtime: str) -> Iterator[SourceGroup]:
    devices = dict.fromkeys(row.device for row in rows)
    for device in devices:
        yield SourceGroup(f"{device.title} ({device.name})", tuple(sources(device)))
    known = load_runtime(runtime)
    for name in dict.fromkeys(device.device_class for device in devices):
        launches = ("launches a layer", f"vision {known.launches.vision}", known.launches.source)
        figures = (*runtime_sources(known.efficiency(name)), launches)
        yield SourceGroup(f"{known.title}, on a device of class {name}", figures)
    shown = [found for row in rows for found in (row, row.vanilla) if found]
    for recipe in {row.candidate.recipe.name: row.candidate.recipe for row in shown}.values():
        if published := recipe.published_accuracy:
            scores = ", ".join(f"{name} {score:g}" for name, score in published.vanilla_scores.items())
            kept = ", ".join(f"{percent:g} % at {tokens}" for tokens, percent in published.percent_of_vanilla.items())
            yield SourceGroup(
                f"Published accuracy of {recipe.name}",
                (("vanilla scores", "", f"{scores}: {published.source}"), ("kept", "", f"{kept}: {published.source}")),
            )
