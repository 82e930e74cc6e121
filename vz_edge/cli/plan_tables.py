"""The tables of ``vz-edge plan`` in a terminal. All but those of ``--verbose`` fit 80 columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from vz_edge.planning.plan import Asked, Row
from vz_edge.planning.plan_text import (
    NO_SCORE,
    digits,
    fit_verdict,
    frames_verdict,
    gigabytes,
    notes,
    question_note,
    score_text,
    scores,
    vanilla_verdict,
)

WEIGHTS = ("decoder", "lm_head", "vision", "token_table")
STYLES = {"fits": "green", "fits with less context": "yellow", "does not fit": "red"}
FITS = {"fits": "yes", "fits with less context": "less", "does not fit": "no"}
SIDE_BY_SIDE = 2  # candidates whose columns fit beside each other
FIGURES = ("needs", "fits", "TTFT", "tok/s")


def print_plan(rows: Sequence[Row], asked: Asked) -> None:
    """One table: a row per device with two candidates at most, else a row per device and candidate."""
    console = Console(highlight=False)
    count = sum(1 for row in rows if row.device is rows[0].device)  # each device has every candidate, in order
    names = [row.candidate.label for row in rows[:count]]
    if count > SIDE_BY_SIDE:
        console.print(_listed(rows))
    else:
        letters = [chr(ord("A") + number) for number in range(count)]
        for letter, name in zip(letters, names, strict=True):
            console.print(f"{letter}: {name}", markup=False)
        console.print(_beside(rows, letters))
        names = letters
    for number, name in enumerate(names):
        for line in _summaries(name, rows[number::count], asked):
            console.print(line, markup=False)
    _print_notes(
        console,
        [
            f"{question_note(asked)} 'has': what an application can have, 'needs': peak memory, in GB of 1e9 bytes; "
            "'TTFT': seconds to the first token; 'less': it fits with less context. The vanilla 7B is the "
            "family's with all tokens at 16 bits.",
            "--verbose: where memory goes, what is assumed, published scores. --html: the source of every figure.",
        ],
    )


def _beside(rows: Sequence[Row], letters: Sequence[str]) -> Table:
    table = _table("device", "has", *(f"{name}\n{figure}" for name in letters for figure in FIGURES))
    for column in table.columns[1:]:
        column.no_wrap = True
    for device, of_device in itertools.groupby(rows, key=lambda row: row.device):
        cells = [cell for row in of_device for cell in _figures(row)]
        table.add_row(device.name, f"{device.app_memory_bytes.value / 1e9:.1f}", *cells)
    return table


def _listed(rows: Sequence[Row]) -> Table:
    table = _table("device", "has", "candidate", *FIGURES)
    table.columns[2].justify, table.columns[2].overflow = "left", "fold"
    for column in (table.columns[1], *table.columns[3:]):
        column.no_wrap = True
    for device, of_device in itertools.groupby(rows, key=lambda row: row.device):
        for number, row in enumerate(of_device):
            name, has = (device.name, f"{device.app_memory_bytes.value / 1e9:.1f}") if number == 0 else ("", "")
            model, bits, tokens = _names(row)
            table.add_row(name, has, f"{model} {bits} bits {tokens}", *_figures(row))
    return table


def _figures(row: Row) -> tuple[str, ...]:
    """What FIGURES says; no times where it does not fit."""
    needs, style = f"{row.memory.peak_bytes / 1e9:.1f}", STYLES[row.fit]
    fits = f"[{style}]{FITS[row.fit]}[/]"
    if row.fit == "does not fit":
        return needs, fits, "-", "-"
    return needs, fits, digits(row.prediction.ttft_sec), digits(row.prediction.tokens_per_sec)


def _summaries(name: str, rows: Sequence[Row], asked: Asked) -> Iterator[str]:
    """One candidate on all devices: against the vanilla 7B, and against the frames that come."""
    compared = [row for row in rows if row.vanilla]
    fitting = [row for row in compared if row.fit != "does not fit"]
    if fitting:
        beaten = sum(bool(row.beats_vanilla) for row in compared)
        held = sum(row.vanilla is not None and row.vanilla.fit != "does not fit" for row in compared)
        sooner = _range([row.speedup or 0.0 for row in fitting], 1)
        memory = _range([row.memory_ratio or 0.0 for row in fitting], 2)
        yield (
            f"{name} beats the vanilla 7B on {beaten} of {len(compared)} devices: its first token comes {sooner} times "
            f"as fast, in {memory} times the memory. The vanilla 7B fits on {held}."
        )
    if asked.frames_per_minute is not None:
        enough = [row.device.name for row in rows if row.fast_enough and row.fit != "does not fit"]
        where = ", ".join(enough) if enough else "none of these"
        yield f"{name} keeps up with {asked.frames_per_minute:g} frames a minute on: {where}."


def _range(values: Sequence[float], decimals: int) -> str:
    low, high = (f"{value:.{decimals}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def print_by_device(rows: Sequence[Row], asked: Asked) -> None:
    """A table per device, with every verdict and every note."""
    console = Console(highlight=False)
    for board, group in itertools.groupby(rows, key=lambda row: row.device):
        of_board = list(group)
        limit = gigabytes(board.app_memory_bytes.value)
        console.print(f"[bold]{board.name}[/bold]: {board.title}, {limit} for an application")
        table = _table("model", "bits", "tokens", "memory, GB", "TTFT", "tokens/s", "verdict")
        _last_is_text(table)
        for row in of_board:
            table.add_row(
                *_names(row),
                _where(row),
                f"{digits(row.prediction.ttft_sec)} s",
                digits(row.prediction.tokens_per_sec),
                f"[{STYLES[row.fit]}]{fit_verdict(row)}[/]",
            )
        console.print(table)
        for row in of_board:
            name, bits, tokens = _names(row)
            for verdict in (vanilla_verdict(row), frames_verdict(row)):
                if verdict:
                    console.print(f"{name} {bits} bits {tokens}: {verdict}", markup=False)
        console.print()
    _print_notes(console, notes(rows, asked))
    if listed := scores(rows):
        _print_notes(console, [f"Published scores here: {listed}."])


def print_best(rows: Sequence[Row], asked: Asked) -> None:
    """What was found for one device, the best first, or that nothing was."""
    console = Console(highlight=False)
    if not rows:
        console.print("nothing fits and meets the limits; loosen them, or ask for a shorter answer or other models")
        return
    board = rows[0].device
    console.print(
        f"[bold]{board.name}[/bold]: {board.title}, {gigabytes(board.app_memory_bytes.value)} for an application"
    )
    table = _table("model", "bits", "tokens", "needs", "first", "tok/s", "answer", "score")
    for row in rows:
        table.add_row(
            *_names(row),
            gigabytes(row.memory.peak_bytes),
            f"{digits(row.prediction.ttft_sec)} s",
            digits(row.prediction.tokens_per_sec),
            f"{digits(row.prediction.answer_sec)} s",
            "-" if row.score is None else score_text(row),
        )
    console.print(table)
    if any(row.score is None for row in rows):
        console.print(f"score -: {NO_SCORE}")
    _print_notes(console, notes(rows, asked))


def _table(*columns: str) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"  # a board of one's own may have any name
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _last_is_text(table: Table) -> None:
    table.columns[-1].justify = "left"
    table.columns[-1].min_width = len("does not fit")


def _names(row: Row) -> tuple[str, str, str]:
    candidate = row.candidate
    return candidate.recipe.name, str(candidate.bits), "all" if candidate.tokens is None else str(candidate.tokens)


def _where(row: Row) -> str:
    """The peak, and where it goes: weights, KV cache, all else."""
    parts = row.memory.parts
    weights, cache = sum(parts.get(name, 0) for name in WEIGHTS), parts.get("kv_cache", 0)
    pieces = (weights, cache, row.memory.peak_bytes - weights - cache)
    return f"{row.memory.peak_bytes / 1e9:.1f} = {' + '.join(f'{size / 1e9:.1f}' for size in pieces)}"


def _print_notes(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, markup=False, style="dim")
