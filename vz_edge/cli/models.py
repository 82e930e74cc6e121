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
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "checkpoint", "all tokens", "default", "presets")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for r in recipes:
        table.add_row(
            r.name,
            r.checkpoint,
            str(r.model.max_tiles * r.model.tower.patches),
            str(r.tokens),
            ", ".join(map(str, r.presets)),
        )
    Console().print(table)
