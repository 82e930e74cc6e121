"""``vz-edge plan``: which model fits which board and how fast it is there, before anything is bought or flashed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vz_edge.cli.planned import THIS_MACHINE, planned_device, planned_recipe

if TYPE_CHECKING:
    from vz_edge.planning.plan import Asked, Row

MODELS = ("llava-next-13b", "llava-next-7b")
SHOWN = 10  # the best of --solve
STATUS_NONE = 1


def command(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Recipes, checkpoints' folders or hub ids. Default: the two LLaVA-NeXT of the paper."),
    ] = None,
    bits: Annotated[list[int] | None, typer.Option(help="Bits of the weights: 4, 8 or 16. Default: 4.")] = None,
    tokens: Annotated[
        list[str] | None, typer.Option(help="Budgets: totals or 'all'. Default: what each recipe has.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="Devices: names, profiles' .yaml files, or 'this' machine. Default: all of 'devices'."),
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
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="A table per device: where memory goes, each verdict, what is assumed."),
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With the device 'this': measure it anew, not what was kept.")
    ] = False,
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
    from vz_edge.cli.plan_tables import print_best, print_by_device, print_plan
    from vz_edge.errors import RequestError
    from vz_edge.planning.plan import Asked
    from vz_edge.planning.plan_page import page
    from vz_edge.planning.plan_text import to_json

    if measure and not set(THIS_MACHINE) & {*(device or ()), solve_device}:
        raise RequestError("--measure is for this machine; say --device this (or --solve this)")
    asked = Asked(runtime, tiles, prompt_tokens, answer_tokens, max_context, frames_per_minute)
    if solve_device is not None:
        if device:
            raise RequestError("--solve names the device itself; leave --device out")
        rows = _solve(solve_device, measure, within_sec, asked, model, bits, tokens)
    elif within_sec is not None:
        raise RequestError("--within-sec is a limit for --solve; give both or neither")
    else:
        rows = _plan(device, measure, asked, model or MODELS, bits or [4], tokens or [])
    if html_file and rows:
        write_text(html_file, page(rows, asked))
    if as_json:
        print(to_json(rows, asked))
    elif solve_device is not None:
        print_best(rows, asked)
    elif verbose:
        print_by_device(rows, asked)
    else:
        print_plan(rows, asked)
    if not rows:
        raise typer.Exit(STATUS_NONE)


def _plan(
    devices: Sequence[str] | None,
    measure: bool,
    asked: Asked,
    models: Sequence[str],
    bits: Sequence[int],
    budgets: Sequence[str],
) -> list[Row]:
    """Every candidate on every device, the smallest device first."""
    from vz_edge.planning.devices import device_names
    from vz_edge.planning.plan import candidates, plan_row
    from vz_edge.planning.roofline import load_runtime

    found = candidates([planned_recipe(name) for name in models], bits, budgets)
    known = load_runtime(asked.runtime).classes
    boards = [planned_device(name, measure) for name in devices or device_names()]
    if not devices:
        boards = sorted(
            (board for board in boards if board.device_class in known), key=lambda board: board.app_memory_bytes.value
        )
    return [plan_row(candidate, board, asked) for board in boards for candidate in found]


def _solve(
    name: str,
    measure: bool,
    within_sec: float | None,
    asked: Asked,
    models: Sequence[str] | None,
    bits: Sequence[int] | None,
    budgets: Sequence[str] | None,
) -> list[Row]:
    from vz_edge.planning.plan import ALL_BITS, candidates, solve
    from vz_edge.recipe import recipe_names

    found = []
    for recipe in map(planned_recipe, models or recipe_names()):
        if recipe.demonstration:  # it fits everywhere and is of no use to anybody's robot
            continue
        totals = budgets or [*map(str, recipe.presets), "all"]
        found += candidates([recipe], bits or ALL_BITS, totals)
    return solve(found, planned_device(name, measure), asked, within_sec)[:SHOWN]
