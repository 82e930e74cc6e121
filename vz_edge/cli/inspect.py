"""``vz-edge inspect``: what is in a bundle, or what a recipe would produce, without running either."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from vz_edge.budget import TokenBudget
    from vz_edge.recipe import ModelSpec

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
    what: Annotated[str, typer.Argument(help="A bundle's folder, or a recipe's name.")],
    bits: Annotated[Literal["4", "8", "16"], typer.Option(help="For a recipe: bits of the weights.")] = "4",
    tokens: Annotated[
        str | None, typer.Option(help="For a recipe: the budget, or 'all'. Default: the recipe's.")
    ] = None,
    target: Annotated[Literal["cpu", "cuda"], typer.Option(help="For a recipe: the target.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a bundle's parts and budget, or what exporting a recipe would give."""
    from vz_edge.errors import RecipeError
    from vz_edge.recipe import recipe_names

    if Path(what).is_dir():
        report = _of_bundle(Path(what))
    elif what in recipe_names() or "/" not in what:
        report = _of_recipe(what, int(bits), tokens, target)
    else:
        raise RecipeError(f"{what} is neither a bundle's folder nor a recipe's name ('vz-edge models' lists them)")
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


def _of_bundle(folder: Path) -> dict[str, Any]:
    from vz_edge.bundle import read_manifest

    manifest = read_manifest(folder)
    return {
        "name": manifest.name,
        "checkpoint": manifest.checkpoint,
        "created_by": manifest.created_by,
        "target": manifest.target,
        "weights": dataclasses.asdict(manifest.weights),
        "bytes": {name: entry.size_bytes for name, entry in manifest.files.items()},
        "kv_cache_bytes_per_token": manifest.predicted["kv_cache_bytes_per_token"],
        "parity": {
            part: {key: value for key, value in record.items() if not isinstance(value, list)}
            for part, record in manifest.parity.items()
        },
        **_budget_report(manifest.model, manifest.budget),
    }


def _of_recipe(name: str, bits: int, tokens: str | None, target: Literal["cpu", "cuda"]) -> dict[str, Any]:
    from vz_edge.budget import parse_tokens
    from vz_edge.bundle import default_weights
    from vz_edge.profiling.memory import bundle_bytes, export_peak_rss_bytes, kv_cache_bytes_per_token
    from vz_edge.recipe import load_recipe

    recipe = load_recipe(name)
    model = recipe.model
    weights = default_weights(bits)  # type: ignore[arg-type]
    budget = parse_tokens(tokens or str(recipe.tokens), model.max_tiles, model.tower.patches)
    return {
        "name": recipe.name,
        "checkpoint": recipe.checkpoint,
        "target": target,
        "weights": dataclasses.asdict(weights),
        "bytes": bundle_bytes(model, weights, target),
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(model.decoder, target),
        "export_peak_rss_bytes": export_peak_rss_bytes(model),
        **_budget_report(model, budget),
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
        f"{weights['quantizer']}, blocks of {weights['block_size']}"
    )
    if budget is None:
        console.print("tokens: all")
    else:
        console.print(f"tokens a tile: {budget['dominant']} dominant + {budget['contextual']} contextual")
    sizes = Table("part", "MB")
    for name, size in report["bytes"].items():
        sizes.add_row(name, f"{size / 1e6:,.2f}")
    sizes.add_row("all", f"{sum(report['bytes'].values()) / 1e6:,.2f}", style="bold")
    console.print(sizes)
    console.print(f"KV cache: {report['kv_cache_bytes_per_token'] / 1e3:.1f} kB a token of context")
    if "export_peak_rss_bytes" in report:
        console.print(f"export: peak memory about {report['export_peak_rss_bytes'] / 1e9:.2f} GB")
    pictures = Table("picture", "grid", "tiles", "tokens", "without selection")
    for row in report["pictures"]:
        pictures.add_row(row["size"], row["grid"] or "-", str(row["tiles"]), str(row["tokens"]), str(row["all_tokens"]))
    console.print(pictures)
    for part, record in report.get("parity", {}).items():
        console.print(
            f"{part} against torch: " + ", ".join(f"{key} {value}" for key, value in record.items()), highlight=False
        )
