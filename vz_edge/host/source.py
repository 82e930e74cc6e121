"""Where a checkpoint comes from: a recipe's name, a local folder or a Hugging Face hub id."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_edge.errors import CheckpointError, ExportError, RecipeError
from vz_edge.recipe import ModelSpec, Recipe, data_folder, load_recipe, recipe_names

# Weights as safetensors, and every small file that says how to use them; no pickles, no code.
HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model")


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine. ``recipe`` is None where ``--model`` was a folder or a hub id."""

    name: str
    checkpoint: str
    folder: Path
    recipe: Recipe | None


def resolve(model: str) -> Source:
    """Find (and if need be download) what ``--model`` names. Raises RecipeError or CheckpointError."""
    if model in recipe_names():
        recipe = load_recipe(model)
        embedded = data_folder("export") / recipe.checkpoint
        if not embedded.is_dir() and "/" not in recipe.checkpoint:  # no hub id: it comes with the sources
            raise CheckpointError(
                f"the checkpoint of {model} is in vz-edge's sources (export/{recipe.checkpoint}) and not in the "
                f"installed package; give its folder in a clone: --model CLONE/export/{recipe.checkpoint}"
            )
        folder = embedded if embedded.is_dir() else download(recipe.checkpoint)
        return Source(recipe.name, recipe.checkpoint, folder, recipe)
    path = Path(model).expanduser()
    if path.is_dir():
        return Source(path.resolve().name, path.resolve().name, path, None)
    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        near = difflib.get_close_matches(model, recipe_names(), n=3, cutoff=0.4) or recipe_names()
        raise RecipeError(
            f"--model {model} is neither a recipe, nor a folder, nor a hub id (owner/name); nearest recipes: "
            f"{', '.join(near)} ('vz-edge models' lists them all)"
        )
    return Source(model.split("/")[1], model, download(model), None)


def resolve_tower(config: dict[str, Any], folder: Path) -> Path:
    """The CLIP repository that an original LLaVA config names in ``mm_vision_tower``: beside it, or on the hub."""
    name = config.get("mm_vision_tower")
    if not isinstance(name, str):
        raise CheckpointError(f"{folder} holds no vision tower and its config.json names none (mm_vision_tower)")
    beside = folder.parent / name.rsplit("/", maxsplit=1)[-1]
    for candidate in (Path(name), beside):
        if candidate.is_dir():
            return candidate
    return download(name)


def matching_recipe(spec: ModelSpec) -> Recipe | None:
    """The shipped recipe of the same family and decoder shape, whose prompt fits a checkpoint that has none."""
    return next((r for r in map(load_recipe, recipe_names()) if _shape(r.model) == _shape(spec)), None)


def check_recipe(source: Source, spec: ModelSpec) -> None:
    """Raise ExportError where the recipe that was asked for describes another model than its checkpoint is."""
    if source.recipe is not None and _shape(source.recipe.model) != _shape(spec):
        raise ExportError(
            f"{source.checkpoint} is {_described(spec)}, and the recipe {source.name} says "
            f"{_described(source.recipe.model)}; correct the recipe, or give the checkpoint alone as --model"
        )


def _shape(model: ModelSpec) -> tuple[object, ...]:
    decoder = model.decoder
    return model.family, decoder.type, decoder.hidden_size, decoder.layers, decoder.kv_heads


def _described(model: ModelSpec) -> str:
    family, decoder, hidden_size, layers, kv_heads = _shape(model)
    return f"{family} with a {decoder} decoder ({layers} layers, {hidden_size} wide, {kv_heads} KV heads)"


def download(hub_id: str) -> Path:
    """Download a hub repository into the Hugging Face cache. Raises CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"cannot download {hub_id}: {reason}; check the name and the network, or download the repository "
            "elsewhere and give its folder as --model"
        ) from error
