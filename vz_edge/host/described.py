"""A checkpoint as a plan sees it: its config alone, as a recipe. No weight is read, and of a hub id none downloaded.

>>> recipe_of("someone/their-llava-13b").model.decoder.layers
40
"""

from __future__ import annotations

from os.path import exists
from pathlib import Path

from vz_edge.host.opened import read_model
from vz_edge.host.source import Source, download, matching_recipe, resolve
from vz_edge.recipe import ModelSpec, PromptSpec, Recipe, load_recipe, recipe_names

CONFIG = ("config.json",)


def recipe_of(model: str) -> Recipe:
    """A recipe for planning what ``--model`` names: a recipe's name, a checkpoint's folder or a hub id.

    Of a checkpoint, default tokens are those of its export, and there is no published score, which only the model that
    was measured has. Raises RecipeError, CheckpointError and UnsupportedModelError.
    """
    if model in recipe_names():
        return load_recipe(model)
    source = _resolve_config(model)
    spec = read_model(source.folder)
    like = matching_recipe(spec)
    return Recipe(
        name=source.name,
        checkpoint=source.checkpoint,
        model=spec,
        prompt=like.prompt if like else PromptSpec("", ()),
        tokens=spec.default_tokens,
        presets=like.presets if like else (spec.default_tokens,),
        vanilla_7b=_vanilla_7b(spec),
    )


def _resolve_config(model: str) -> Source:
    """As ``resolve``, but of a hub id nothing is downloaded but the config."""
    path = Path(model).expanduser()
    is_hub_id = model.count("/") == 1 and not exists(path) and not path.is_absolute() and not model.startswith(".")
    return Source(model.split("/")[1], model, download(model, CONFIG), None) if is_hub_id else resolve(model)


def _vanilla_7b(spec: ModelSpec) -> str | None:
    """The 7B that the family's recipes are compared with."""
    recipes = map(load_recipe, recipe_names())
    return next((found.vanilla_7b for found in recipes if found.model.family == spec.family and found.vanilla_7b), None)
