"""Recipes: what to export, with which defaults, as data (``export/*.yaml``).

A recipe names a checkpoint and says what its files do not: the prompt to fall back on, the default budget,
the paper's presets. Its ``model`` section is the architecture as published, so that a plan can be made
before anything is downloaded; at export the checkpoint's own ``config.json`` is read into the same
dataclasses and wins.

>>> load_recipe("llava-next-13b").model.decoder.hidden_size
5120
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from vz_edge import strict
from vz_edge.errors import RecipeError

PACKAGED_DATA = Path(__file__).parent / "data"
REPOSITORY = Path(__file__).parent.parent


@dataclass(frozen=True)
class TowerSpec:
    """A vision tower. The defaults are CLIP ViT-L/14-336, which every published LLaVA checkpoint has."""

    type: Literal["clip"] = "clip"
    hidden_size: int = 1024
    intermediate_size: int = 4096
    layers: int = 24
    heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a tile, CLS not counted."""
        return self.patches_per_side**2


@dataclass(frozen=True)
class DecoderSpec:
    """A Llama-like decoder. ``rope_scaling`` is the checkpoint's own mapping (``rope_type`` and its numbers)."""

    type: Literal["llama", "mistral", "qwen2"]
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """One vision-language model: a tower, a two-layer projector, a decoder, and how pictures are tiled.

    ``grid_pinpoints`` are the anyres resolutions as (height, width) in pixels; empty for a family without a
    grid. ``feature_layer`` indexes the tower's hidden states as transformers does (-2: input of the last layer).
    """

    family: Literal["llava", "llava_next"]
    decoder: DecoderSpec
    image_token_id: int
    tower: TowerSpec = TowerSpec()
    feature_layer: int = -2
    projector_activation: Literal["gelu"] = "gelu"
    grid_pinpoints: tuple[tuple[int, int], ...] = ()

    @property
    def max_tiles(self) -> int:
        """Tiles of the picture that costs the most: the largest grid and the base tile."""
        side = self.tower.image_size
        return 1 + max(((height // side) * (width // side) for height, width in self.grid_pinpoints), default=0)


@dataclass(frozen=True)
class PromptSpec:
    """How to ask: a chat template used where the checkpoint has none, and the strings that end an answer."""

    template: str
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """One file of ``export/``. ``presets`` are the paper's totals, ``tokens`` the default budget."""

    name: str
    checkpoint: str
    model: ModelSpec
    prompt: PromptSpec
    tokens: int
    presets: tuple[int, ...]
    image_mode: Literal["stock", "pad"] = "stock"


def data_folder(name: str) -> Path:
    """The folder ``export`` or ``profiles``: inside an installed wheel, else at the top of the repository."""
    packaged = PACKAGED_DATA / name
    return packaged if packaged.is_dir() else REPOSITORY / name


def recipe_names() -> list[str]:
    """Names of the recipes that ship with this version, sorted."""
    return sorted(path.stem for path in data_folder("export").glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises RecipeError with the nearest names where there is none."""
    path = data_folder("export") / f"{name}.yaml"
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=3, cutoff=0.4)
        nearest = f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(recipe_names())}"
        raise RecipeError(f"no recipe '{name}'; {nearest} ('vz-edge models' lists them all)")
    return parse_recipe(path)


def parse_recipe(path: Path) -> Recipe:
    """Parse one recipe file strictly. Raises RecipeError naming the file and the key."""
    try:
        recipe = strict.load(Recipe, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (strict.SchemaError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: {error}") from error
    if recipe.name != path.stem:
        raise RecipeError(f"{path}: name is '{recipe.name}', expected '{path.stem}' as the file is called")
    return recipe
