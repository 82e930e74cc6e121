"""``vz-edge plan``: which model fits which board and how fast it is there, before anything is bought or flashed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from vz_edge.planning.plan import Asked, Row

MODELS = ("llava-next-13b", "llava-next-7b")
SHOWN = 10  # the best of --solve
STATUS_NONE = 1
WEIGHTS = ("decoder", "lm_head", "vision", "token_table")
STYLES = {"fits": "green", "fits with less context": "yellow", "does not fit": "red"}


def command(
    model: Annotated[list[str] | None, typer.Option(help="Recipes. Default: the two LLaVA-NeXT of the paper.")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="Bits of the weights: 4, 8 or 16. Default: 4.")] = None,
    tokens: Annotated[
        list[str] | None, typer.Option(help="Budgets: totals or 'all'. Default: what each recipe has.")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="Devices: names or profiles' .yaml files. Default: all of 'devices'.")
    ] = None,
    runtime: Annotated[
        Literal["onnxruntime", "transformers"], typer.Option(help="Our bundles, or the paper's own code.")
    ] = "onnxruntime",
    tiles: Annotated[int | None, typer.Option(help="Tiles of the picture. Default: the most of each model.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, the picture's not counted.")] = 70,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of the answer.")] = 64,
    max_context: Annotated[
        int | None, typer.Option(help="Tokens that the KV cache is sized for. Default: what the question needs.")
    ] = None,
    frames_per_minute: Annotated[float | None, typer.Option(help="Is it fast enough for so many answers?")] = None,
    solve_device: Annotated[
        str | None,
        typer.Option("--solve", help="Instead: the best models, bits and budgets that fit this device and the limits."),
    ] = None,
    within_sec: Annotated[float | None, typer.Option(help="With --solve: the latest first token, in seconds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with memory by stage and part.")] = False,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a page with bars and every figure's source.")
    ] = None,
) -> None:
    """Predict memory, time to first token and decode rate, and whether a model fits and beats the vanilla 7B.

    --solve looks through all recipes, bits and budgets that are not narrowed down, orders by published score and then
    by time, shows the best ten and ends with status 1 where there is none.
    """
    from vz_edge.cli.output_file import write_text
    from vz_edge.errors import RequestError
    from vz_edge.planning.plan import Asked
    from vz_edge.planning.plan_page import page
    from vz_edge.planning.plan_text import to_json

    asked = Asked(runtime, tiles, prompt_tokens, answer_tokens, max_context, frames_per_minute)
    if solve_device is not None:
        if device:
            raise RequestError("--solve names the device itself; leave --device out")
        rows = _solve(solve_device, within_sec, asked, model, bits, tokens)
    elif within_sec is not None:
        raise RequestError("--within-sec is a limit for --solve; give both or neither")
    else:
        rows = _plan(device, asked, model or MODELS, bits or [4], tokens or [])
    if html_file and rows:
        write_text(html_file, page(rows, asked))
    if as_json:
        print(to_json(rows, asked))
    elif solve_device is not None:
        _print_best(rows, asked)
    else:
        _print_plan(rows, asked)
    if not rows:
        raise typer.Exit(STATUS_NONE)


def _plan(
    devices: Sequence[str] | None, asked: Asked, models: Sequence[str], bits: Sequence[int], budgets: Sequence[str]
) -> list[Row]:
    """Every candidate on every device, the smallest device first."""
    from vz_edge.planning.devices import device_names, load_device
    from vz_edge.planning.plan import candidates, plan_row
    from vz_edge.planning.roofline import load_runtime
    from vz_edge.recipe import load_recipe

    found = candidates([load_recipe(name) for name in models], bits, budgets)
    known = load_runtime(asked.runtime).classes
    boards = [load_device(name) for name in devices or device_names()]
    if not devices:
        boards = sorted(
            (board for board in boards if board.device_class in known), key=lambda board: board.app_memory_bytes.value
        )
    return [plan_row(candidate, board, asked) for board in boards for candidate in found]


def _solve(
    name: str,
    within_sec: float | None,
    asked: Asked,
    models: Sequence[str] | None,
    bits: Sequence[int] | None,
    budgets: Sequence[str] | None,
) -> list[Row]:
    from vz_edge.planning.devices import load_device
    from vz_edge.planning.plan import ALL_BITS, candidates, solve
    from vz_edge.recipe import load_recipe, recipe_names

    board = load_device(name)
    found = []
    for recipe in map(load_recipe, models or recipe_names()):
        totals = budgets or [*map(str, recipe.presets), "all"]
        found += candidates([recipe], bits or ALL_BITS, totals)
    return solve(found, board, asked, within_sec)[:SHOWN]


def _print_plan(rows: Sequence[Row], asked: Asked) -> None:
    from rich.console import Console

    from vz_edge.planning.plan_text import (
        digits,
        fit_verdict,
        frames_verdict,
        gigabytes,
        notes,
        scores,
        vanilla_verdict,
    )

    console = Console(highlight=False)
    for board, group in itertools.groupby(rows, key=lambda row: row.device):
        of_board = list(group)
        limit = gigabytes(board.app_memory_bytes.value)
        console.print(f"[bold]{board.name}[/bold]: {board.title}, {limit} for an application")
        table = _table("model", "bits", "tokens", "memory, GB", "TTFT", "tokens/s", "verdict")
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


def _print_best(rows: Sequence[Row], asked: Asked) -> None:
    from rich.console import Console

    from vz_edge.planning.plan_text import digits, gigabytes, notes, score_text

    console = Console(highlight=False)
    if not rows:
        console.print("nothing fits and meets the limits; loosen them, or ask for a shorter answer or other models")
        return
    board = rows[0].device
    console.print(
        f"[bold]{board.name}[/bold]: {board.title}, {gigabytes(board.app_memory_bytes.value)} for an application"
    )
    table = _table("model", "bits", "tokens", "memory", "TTFT", "tokens/s", "answer in", "published score")
    for row in rows:
        table.add_row(
            *_names(row),
            gigabytes(row.memory.peak_bytes),
            f"{digits(row.prediction.ttft_sec)} s",
            digits(row.prediction.tokens_per_sec),
            f"{digits(row.prediction.answer_sec)} s",
            score_text(row),
        )
    console.print(table)
    _print_notes(console, notes(rows, asked))


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True
    for column in table.columns[1:-1]:
        column.justify = "right"
    table.columns[-1].min_width = len("does not fit")
    return table


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
