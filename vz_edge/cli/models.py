"""``vz-edge models``: the recipes that ship with this version."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models that --model knows by name."""
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
            }
            for r in recipes
        ]
        print(json.dumps(rows, indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "checkpoint", "tokens", "presets", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for r in recipes:
        table.add_row(
            r.name,
            r.checkpoint,
            f"{r.tokens} of {r.model.max_tiles * r.model.tower.patches}",
            ", ".join(map(str, r.presets)),
        )
    Console().print(table)
