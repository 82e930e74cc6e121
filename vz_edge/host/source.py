"""Where a checkpoint comes from: a recipe's name, a local folder or a Hugging Face hub id."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_edge.errors import CheckpointError, ExportError, RecipeError
from vz_edge.host.checkpoint import read_json
from vz_edge.host.config_file import read_config
from vz_edge.host.original_llava import is_usual_tower
from vz_edge.recipe import ModelSpec, Recipe, data_folder, load_recipe, recipe_names

# Every small file that says how to use weights, then these as safetensors; no pickles, no code.
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model")
HUB_PATTERNS = ("*.safetensors", *SMALL_FILES)


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
        folder = embedded if embedded.is_dir() else fetch(recipe.checkpoint)
        return Source(recipe.name, recipe.checkpoint, folder, recipe)
    path = Path(model).expanduser()
    if path.is_dir():
        folder = snapshot_of(path)
        checkpoint = _hub_id(folder) or path.resolve().name
        return Source(checkpoint.split("/")[-1], checkpoint, folder, None)
    if path.is_file():
        raise CheckpointError(f"--model {model} is a file; expected the folder that it lies in, with its config.json")
    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        near = difflib.get_close_matches(model, recipe_names(), n=3, cutoff=0.4) or recipe_names()
        raise RecipeError(
            f"--model {model} is neither a recipe, nor a folder, nor a hub id (owner/name); nearest recipes: "
            f"{', '.join(near)} ('vz-edge models' lists them all)"
        )
    return Source(model.split("/")[1], model, fetch(model), None)


def snapshot_of(folder: Path) -> Path:
    """The checkpoint in a folder of the hub's cache, ``models--owner--name`` or its ``snapshots``; others as they are.

    It is the one that ``refs/main`` names, else the only one. Raises CheckpointError where there are several.
    """
    repository = folder.parent if folder.name == "snapshots" else folder
    snapshots = repository / "snapshots"
    if not snapshots.is_dir() or (folder / "config.json").is_file():
        return folder
    main = repository / "refs" / "main"
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    named = [path for path in found if main.is_file() and path.name == main.read_text(encoding="utf-8").strip()]
    chosen = named or found
    if len(chosen) != 1:
        there = f"several snapshots ({', '.join(path.name for path in found)})" if found else "no snapshot"
        raise CheckpointError(
            f"{repository} is a folder of the hub's cache with {there}; give the folder of one, or its hub id"
        )
    return chosen[0]


def _hub_id(folder: Path) -> str | None:
    """``owner/name`` of a snapshot in the hub's cache."""
    *_, repository, snapshots, _ = ("", "", *folder.resolve().parts)
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def resolve_tower(config: dict[str, Any], folder: Path) -> Path:
    """The CLIP repository that an original LLaVA config names in ``mm_vision_tower``: beside it, or on the hub."""
    name = config.get("mm_vision_tower")
    if not isinstance(name, str):
        raise CheckpointError(f"{folder} holds no vision tower and its config.json names none (mm_vision_tower)")
    return local_tower(name, folder) or download(name)


def tower_config(config: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """config.json of that repository; None for the usual tower where it is not on this machine.

    Raises CheckpointError.
    """
    name = config.get("mm_vision_tower")
    if not isinstance(name, str):
        raise CheckpointError(f"{folder}/config.json: mm_vision_tower is {name!r}; expected a repository or a folder")
    tower = local_tower(name, folder)
    if tower is not None and (tower / "config.json").is_file():
        return read_json(tower / "config.json")
    if is_usual_tower(name):
        return None
    return read_json(download(name, ("config.json",)) / "config.json")


def local_tower(name: str, folder: Path) -> Path | None:
    """The folder of the tower ``name`` on this machine: in the checkpoint's, as a path, or beside the checkpoint."""
    beside = folder.parent / name.rstrip("/").rsplit("/", maxsplit=1)[-1]
    for candidate in (folder / name, Path(name).expanduser(), beside):
        if candidate.is_dir():
            return snapshot_of(candidate)
    return None


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


def fetch(hub_id: str) -> Path:
    """Download a model's repository; what cannot be exported is refused before its weights come.

    Raises CheckpointError, UnsupportedModelError.
    """
    read_config(download(hub_id, SMALL_FILES))
    return download(hub_id)


def download(hub_id: str, patterns: tuple[str, ...] = HUB_PATTERNS) -> Path:
    """Download a hub repository's files of ``patterns`` into the Hugging Face cache. Raises CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"cannot download {hub_id}: {reason}; check the name and the network, or download the repository "
            "elsewhere and give its folder as --model"
        ) from error
