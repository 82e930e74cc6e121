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

    def layers_before(self, feature_layer: int) -> int:
        """Layers that run for hidden state ``feature_layer``, indexed as transformers does (-2: all but the last)."""
        return feature_layer if feature_layer >= 0 else self.layers + 1 + feature_layer


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
    Where the projector reads several of them side by side, ``feature_layers`` has all in its order, and
    ``feature_layer`` is the deepest, whose attention ranks the tokens. With all tokens the decoder gets CLS too where
    ``cls_is_token``; a budget always keeps it. ``projector_bias``: whether the projector's layers have biases.
    """

    family: Literal["llava", "llava_next"]
    decoder: DecoderSpec
    image_token_id: int
    tower: TowerSpec = TowerSpec()
    feature_layer: int = -2
    projector_activation: Literal["gelu"] = "gelu"
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    feature_layers: tuple[int, ...] = ()
    cls_is_token: bool = False
    projector_bias: bool = True

    @property
    def all_tokens_per_tile(self) -> int:
        """Tokens of a tile that is not reduced."""
        return self.tower.patches + self.cls_is_token

    @property
    def states_read(self) -> tuple[int, ...]:
        """How many layers of the tower run for each hidden state that the projector reads, in its order."""
        return tuple(self.tower.layers_before(layer) for layer in self.feature_layers or (self.feature_layer,))

    @property
    def feature_width(self) -> int:
        """Numbers of a token that the projector reads."""
        return len(self.states_read) * self.tower.hidden_size

    @property
    def max_tiles(self) -> int:
        """Tiles of the picture that costs the most: the largest grid and the base tile."""
        side = self.tower.image_size
        return 1 + max(((height // side) * (width // side) for height, width in self.grid_pinpoints), default=0)

    @property
    def default_tokens(self) -> int:
        """The total of a model without a recipe: a ninth of all tokens, the paper's middle setting."""
        return self.tower.patches // 9 * self.max_tiles


@dataclass(frozen=True)
class PromptSpec:
    """How to ask: a chat template used where the checkpoint has none, and the strings that end an answer."""

    template: str
    stop: tuple[str, ...]


@dataclass(frozen=True)
class QuantisedAccuracy:
    """What quantised weights were published to keep at one budget: percent of the vanilla 16-bit model, by bits."""

    tokens: int
    percent_of_vanilla: dict[str, float]
    source: str


@dataclass(frozen=True)
class PublishedAccuracy:
    """What is published of a model's answers, training-free.

    ``vanilla_scores`` are percentages by benchmark with all tokens at 16 bits, of the benchmarks that the source has
    for every model; ``percent_of_vanilla`` is the source's own average of what is kept, by budget (a total, as in
    ``presets``).
    """

    vanilla_scores: dict[str, float]
    percent_of_vanilla: dict[str, float]
    source: str
    quantised: QuantisedAccuracy | None = None

    def score(self, tokens: int | None) -> float | None:
        """Mean vanilla score times what that budget keeps (None: all tokens); None where nothing is published."""
        percent = 100.0 if tokens is None else self.percent_of_vanilla.get(str(tokens))
        mean = sum(self.vanilla_scores.values()) / len(self.vanilla_scores)
        return None if percent is None else mean * percent / 100


@dataclass(frozen=True)
class ModelLicense:
    """Under which license the checkpoint is published, and where that was read.

    ``note`` says what the publisher asks beyond it. A bundle made of the checkpoint is under the same terms.
    """

    name: str
    source: str
    note: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One file of ``export/``. ``presets`` are the paper's totals, ``tokens`` the default budget.

    ``vanilla_7b`` is the recipe of the family's 7B, which a plan compares with. A ``demonstration`` is a model to try
    the tools with, which a plan never recommends. ``license`` is the checkpoint's, not that of this package; None where
    nobody wrote it down.
    """

    name: str
    checkpoint: str
    model: ModelSpec
    prompt: PromptSpec
    tokens: int
    presets: tuple[int, ...]
    image_mode: Literal["stock", "pad"] = "stock"
    vanilla_7b: str | None = None
    published_accuracy: PublishedAccuracy | None = None
    demonstration: bool = False
    license: ModelLicense | None = None


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
    if recipe.published_accuracy:
        _check_accuracy(path, recipe.published_accuracy, recipe.presets)
    return recipe


def _check_accuracy(path: Path, published: PublishedAccuracy, presets: tuple[int, ...]) -> None:
    key = "published_accuracy"
    for tokens in published.percent_of_vanilla:
        if tokens not in map(str, presets):
            listed = ", ".join(map(str, presets))
            raise RecipeError(f"{path}: {key}.percent_of_vanilla.{tokens}: expected one of the presets, {listed}")
    if not published.vanilla_scores:
        raise RecipeError(f"{path}: {key}.vanilla_scores is empty; expected a percentage a benchmark")
    figures = {f"vanilla_scores.{name}": (value, 100) for name, value in published.vanilla_scores.items()}
    # A selection may answer a little better than the model did: 100.6 % is published for one trained with it.
    figures |= {f"percent_of_vanilla.{name}": (value, 110) for name, value in published.percent_of_vanilla.items()}
    if published.quantised:
        percents = published.quantised.percent_of_vanilla
        figures |= {f"quantised.percent_of_vanilla.{name}": (value, 110) for name, value in percents.items()}
    for name, (value, highest) in figures.items():
        if not 0 < value <= highest:
            raise RecipeError(f"{path}: {key}.{name} is {value:g}; expected a percentage of at most {highest}")
