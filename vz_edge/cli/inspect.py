"""``vz-edge inspect``: what is in a bundle, or what a recipe would produce, without running either."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from os.path import exists, isfile  # which say no of what is no path at all
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vz_edge.cli.planned import planned_device, planned_recipe

if TYPE_CHECKING:
    from rich.console import Console

    from vz_edge.budget import TokenBudget
    from vz_edge.bundle import Manifest, WeightSpec
    from vz_edge.recipe import ModelSpec

# The device whose memory plan is shown unless another is asked for, by target.
NATURAL_DEVICE = {"cpu": "cpu", "cuda": "agx-orin-64"}
# Pictures of every common shape, as (width, height) in pixels.
COMMON_SIZES = (
    (336, 336),
    (640, 480),
    (480, 640),
    (1280, 720),
    (720, 1280),
    (1920, 1080),
    (1000, 1000),
    (2000, 500),
    (500, 2000),
)


def command(
    what: Annotated[
        str, typer.Argument(help="A bundle's folder; or what to export: a recipe, a checkpoint's folder, a hub id.")
    ],
    bits: Annotated[
        Literal["4", "8", "16"] | None, typer.Option(help="Before an export: bits of the weights. Default: 4.")
    ] = None,
    format_: Annotated[
        Literal["onnx", "bnb"] | None,
        typer.Option("--format", help="Before an export: as for 'vz-edge export'. Default: onnx."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Before an export: the budget, or 'all'. Default: the recipe's.")
    ] = None,
    target: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Before an export: the target. Default: cpu.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Memory is planned for this device. Default: cpu, or agx-orin-64 for the target cuda."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a bundle's parts, budget and memory plan, or what an export would give; of a checkpoint, from its config."""
    from vz_edge.bundle import MANIFEST

    folder = Path(what)
    checkpoint = isfile(folder / "config.json") and not isfile(folder / MANIFEST)
    if "://" in what or (exists(folder) and not checkpoint):
        _refuse_for_a_bundle(what, {"bits": bits, "format": format_, "tokens": tokens, "target": target})
        report = _of_bundle(folder, device)
    else:
        report = _of_recipe(what, format_ or "onnx", int(bits or 4), tokens, target or "cpu", device)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


def _refuse_for_a_bundle(folder: str, options: dict[str, str | None]) -> None:
    """Raise RequestError where an option was given that a bundle has answered when it was exported."""
    from vz_edge.errors import RequestError

    given = ", ".join(f"--{name} {value}" for name, value in options.items() if value is not None)
    if given:
        raise RequestError(f"{folder} is a bundle, exported as it is: {given} is for a recipe's name; leave it out")


def _of_bundle(folder: Path, device: str | None) -> dict[str, Any]:
    from vz_edge.bundle import read_manifest

    manifest = read_manifest(folder)
    return {
        "name": manifest.name,
        "checkpoint": manifest.checkpoint,
        "created_by": manifest.created_by,
        "format": manifest.format,
        "target": manifest.target,
        "weights": dataclasses.asdict(manifest.weights),
        "bytes": {name: entry.size_bytes for name, entry in manifest.files.items()},
        "kv_cache_bytes_per_token": _kv_cache_bytes_per_token(manifest.model, manifest.format, manifest.target),
        "more_budgets": [budget.total(manifest.model.max_tiles) for budget in manifest.more_budgets],
        "parity": {
            part: {key: value for key, value in record.items() if not isinstance(value, tuple)}
            for part, record in _parity_records(manifest)
        },
        "memory_plan": _memory_plan(manifest.model, manifest.weights, manifest.budget, manifest.target, device),
        **_budget_report(manifest.model, manifest.budget),
    }


def _parity_records(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the export compared with torch: each part, and vision with each further budget."""
    parity = manifest.parity
    for part, record in (("vision", parity.vision), ("decoder", parity.decoder)):
        if record is not None:
            yield part, dataclasses.asdict(record)
    for budget, further in zip(manifest.more_budgets, parity.more_budgets, strict=False):
        yield f"vision at {budget.total(manifest.model.max_tiles)} tokens", dataclasses.asdict(further)


def _of_recipe(
    name: str,
    format_: Literal["onnx", "bnb"],
    bits: Literal[4, 8, 16],
    tokens: str | None,
    target: Literal["cpu", "cuda"],
    device: str | None,
) -> dict[str, Any]:
    from vz_edge.budget import parse_tokens
    from vz_edge.bundle import bitsandbytes_weights, default_weights
    from vz_edge.planning.memory import bundle_bytes, export_peak_rss_bytes

    recipe = planned_recipe(name)
    model = recipe.model
    weights = bitsandbytes_weights(bits) if format_ == "bnb" else default_weights(bits)
    budget = parse_tokens(tokens or str(recipe.tokens), model.max_tiles, model.tower.patches)
    return {
        "name": recipe.name,
        "checkpoint": recipe.checkpoint,
        "format": format_,
        "target": target,
        "weights": dataclasses.asdict(weights),
        "bytes": bundle_bytes(model, weights, target),
        "kv_cache_bytes_per_token": _kv_cache_bytes_per_token(model, format_, target),
        "export_peak_rss_bytes": export_peak_rss_bytes(model),
        "memory_plan": _memory_plan(model, weights, budget, target, device),
        **_budget_report(model, budget),
    }


def _kv_cache_bytes_per_token(model: ModelSpec, format_: Literal["onnx", "bnb"], target: Literal["cpu", "cuda"]) -> int:
    from vz_edge.planning.memory import kv_cache_bytes_per_token

    # torch holds the cache in 16 bits on the CPU too.
    return kv_cache_bytes_per_token(model.decoder, "cuda" if format_ == "bnb" else target)


def _memory_plan(
    model: ModelSpec, weights: WeightSpec, budget: TokenBudget | None, target: str, device: str | None
) -> dict[str, Any]:
    """What an answer about the picture of the most tiles takes, by stage and part."""
    from vz_edge.errors import DeviceError
    from vz_edge.planning.plan import ANSWER_TOKENS, PROMPT_TOKENS
    from vz_edge.planning.predict import memory_plan
    from vz_edge.planning.question import Question, all_tokens

    board = planned_device(device or NATURAL_DEVICE[target])
    if (board.device_class == "cpu") != (target == "cpu"):
        kind = "a processor" if target == "cpu" else "a GPU"
        raise DeviceError(f"{board.name} cannot run what is exported for {target}; give --device {kind}'s profile")
    tiles = model.max_tiles
    image_tokens = all_tokens(model, tiles) if budget is None else budget.total(tiles)
    per_tile = model.all_tokens_per_tile if budget is None else budget.per_tile
    question = Question(tiles, image_tokens, per_tile, PROMPT_TOKENS, ANSWER_TOKENS)
    plan = memory_plan(model, weights, question, board, "onnxruntime", selects=budget is not None)
    return {
        "device": board.name,
        "app_memory_bytes": board.app_memory_bytes.value,
        "context_tokens": question.context_tokens,
        "peak_bytes": plan.peak_bytes,
        "stages": plan.stages,
    }


def _budget_report(model: ModelSpec, budget: TokenBudget | None) -> dict[str, Any]:
    from vz_edge.device.image import grid_of, tile_count, token_count

    pictures = [
        {
            "size": f"{size[0]}x{size[1]}",
            "grid": "x".join(map(str, grid_of(size, model))) if model.grid_pinpoints else None,
            "tiles": tile_count(size, model),
            "tokens": token_count(size, model, budget),
            "all_tokens": token_count(size, model, None),
        }
        for size in COMMON_SIZES
    ]
    return {"budget_per_tile": None if budget is None else dataclasses.asdict(budget), "pictures": pictures}


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    weights, budget = report["weights"], report["budget_per_tile"]
    console.print(f"[bold]{report['name']}[/bold] ({report['checkpoint']}) for {report['target']}", highlight=False)
    console.print(
        f"weights: {weights['bits']} bits, lm_head {weights['lm_head_bits']}, vision {weights['vision_bits']}; "
        f"{weights['quantizer']}, {f'blocks of {size}' if (size := weights['block_size']) else 'a scale a row'}"
    )
    if budget is None:
        console.print("tokens: all")
    else:
        console.print(f"tokens a tile: {budget['dominant']} dominant + {budget['contextual']} contextual")
    if report.get("more_budgets"):
        console.print(f"further budgets, in all: {', '.join(map(str, report['more_budgets']))} tokens")
    sizes = Table("part", "MB")
    for name, size in report["bytes"].items():
        sizes.add_row(name, f"{size / 1e6:,.2f}")
    sizes.add_row("all", f"{sum(report['bytes'].values()) / 1e6:,.2f}", style="bold")
    console.print(sizes)
    console.print(f"KV cache: {report['kv_cache_bytes_per_token'] / 1e3:.1f} kB a token of context")
    if "export_peak_rss_bytes" in report:
        console.print(f"export: peak memory about {report['export_peak_rss_bytes'] / 1e9:.2f} GB")
    _print_memory_plan(console, report["memory_plan"])
    pictures = Table("picture", "grid", "tiles", "tokens", "without selection")
    for row in report["pictures"]:
        pictures.add_row(row["size"], row["grid"] or "-", str(row["tiles"]), str(row["tokens"]), str(row["all_tokens"]))
    console.print(pictures)
    for part, record in report.get("parity", {}).items():
        console.print(
            f"{part} against torch: " + ", ".join(f"{key} {value}" for key, value in record.items()), highlight=False
        )


def _print_memory_plan(console: Console, plan: dict[str, Any]) -> None:
    from rich.table import Table

    stages = plan["stages"]
    table = Table(f"memory on {plan['device']}, GB", *stages)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in dict.fromkeys(part for parts in stages.values() for part in parts):
        sizes = [parts.get(part) for parts in stages.values()]
        table.add_row(part, *("-" if size is None else f"{size / 1e9:.2f}" for size in sizes))
    table.add_row("all", *(f"{sum(parts.values()) / 1e9:.2f}" for parts in stages.values()), style="bold")
    console.print(table)
    spare = plan["app_memory_bytes"] - plan["peak_bytes"]
    left = f"{spare / 1e9:.2f} GB to spare" if spare >= 0 else f"{-spare / 1e9:.2f} GB short"
    console.print(
        f"predicted for a picture of the most tiles and a context of {plan['context_tokens']} tokens; "
        f"an application can have {plan['app_memory_bytes'] / 1e9:.2f} GB there: {left}",
        highlight=False,
    )
