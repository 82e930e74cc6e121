"""``vz-edge models``: the recipes that ship with this version."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vz_edge.recipe import Recipe


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models that --model knows by name, and the licenses of their weights."""
    from vz_edge.recipe import load_recipe, recipe_names

    recipes = [load_recipe(name) for name in recipe_names()]
    if as_json:
        rows = [
            {
                "name": r.name,
                "checkpoint": r.checkpoint,
                "family": r.model.family,
                "tokens": r.tokens,
                "presets": r.presets,
                "license": dataclasses.asdict(r.license) if r.license else None,
            }
            for r in recipes
        ]
        print(json.dumps(rows, indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("name, checkpoint, license", "tokens", "presets", box=box.SIMPLE_HEAD, pad_edge=False)
    for r in recipes:
        table.add_row(
            "\n  ".join([f"[bold]{r.name}[/]", r.checkpoint, *_license(r)]),
            f"{r.tokens} of {r.model.max_tiles * r.model.tower.patches}",
            ", ".join(map(str, r.presets)),
        )
    Console().print(table)
    print("The license is that of the weights; 'vz-edge models --json' says where each was read.")


def _license(recipe: Recipe) -> list[str]:
    if recipe.license is None:
        return ["license not known"]
    return [recipe.license.name, *([recipe.license.note] if recipe.license.note else [])]
