"""The model side of ``vz_edge.compress``: transformers' LLaVA with VisionZip in its vision path.

A compressed model is the same object of the same class with the same weights; only its inner model (``model.model``)
has a ``get_image_features`` of its own, and a check of its own that prompts and pictures fit together. All else,
library classes and other models of the process included, is as it was.

::

    pixel_values ── tower, layers 1 to n ──┬─ hidden ──────────────── select ── arrange ── projector ── features
                                           └─ CLS query, keys of n ─────┘

The tower's layers run as they are, with whatever attention the model was loaded with, and those after the feature
layer not at all. What ranks the patches is one row of one layer's attention: its CLS query and keys are projected
once more from the layer's input by the layer's own modules (quantised, offloaded or adapted as they may be), which
is 1/12 of one layer's linear work. No layer has to hand out attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from vz_edge.budget import TokenBudget
from vz_edge.device.image import best_grid
from vz_edge.errors import RequestError
from vz_edge.host.families import FAMILIES
from vz_edge.host.select.visionzip import cls_scores, mean_keys, select
from vz_edge.recipe import TowerSpec


@dataclass(frozen=True)
class Compression:
    """How a model's pictures are reduced: what its config says of them, the total asked for, the budget of a tile.

    ``family`` is a key of FAMILIES; ``states_read`` and ``grid_pinpoints`` are as in ModelSpec.
    """

    family: str
    tower: TowerSpec
    states_read: tuple[int, ...]
    grid_pinpoints: tuple[tuple[int, int], ...]
    total: int
    budget: TokenBudget

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(columns, rows) of the grid of a picture; only in a family with a grid."""
        return best_grid((width, height), self.grid_pinpoints, self.tower.image_size)

    def tokens(self, height: int, width: int) -> int:
        """Visual tokens of a picture."""
        if not FAMILIES[self.family].HAS_GRID:
            return self.budget.total(1)
        columns, rows = self.grid(height, width)
        return self.budget.total(1 + columns * rows)


@dataclass
class CompressedFeatures(BaseModelOutputWithPooling):
    """What ``get_image_features`` of a compressed model returns, a picture an item.

    ``pooler_output``: features [tokens, hidden], where transformers' models have theirs. ``kept``: positions
    [tiles, dominant] int64 in each tile, ascending, 0 = CLS. The other fields are None.
    """

    kept: tuple[Tensor, ...] | None = None


class _MethodOf:
    """A method of one model object, put into its ``__dict__`` where the class's method is then not looked for.

    A subclass would be found by its name: transformers chooses the key names that ``save_pretrained`` writes by the
    name of ``model.model``'s class. The reference is weak, so that a model that is let go frees its memory at once;
    a copy of the model, or a pickle, gets a method of its own.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    @property
    def model(self) -> Any:
        """The model that has this method."""
        return self._model()

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    def __getstate__(self) -> Any:
        return self.model

    def __setstate__(self, model: Any) -> None:
        self._model = weakref.ref(model)


class LlavaFeatures(_MethodOf):
    """``get_image_features`` of a compressed LlavaModel."""

    @can_return_tuple
    def __call__(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> CompressedFeatures:
        """Features of ``pixel_values`` [pictures, 3, s, s]; hidden states and attentions are not collected."""
        _check_request(self.config, vision_feature_layer, vision_feature_select_strategy)
        one_each = [1] * len(pixel_values)
        return reduced_features(self.model, self.model.compression, pixel_values, one_each, one_each)


class LlavaNextFeatures(_MethodOf):
    """``get_image_features`` of a compressed LlavaNextModel."""

    @can_return_tuple
    def __call__(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> CompressedFeatures:
        """Features of ``pixel_values``; hidden states and attentions are not collected.

        They are [pictures, tiles, 3, s, s], padded to the largest number of tiles, or [tiles, 3, s, s] of all
        pictures after one another; ``image_sizes`` [pictures, 2] are (height, width). Raises RequestError.
        """
        _check_request(self.config, vision_feature_layer, vision_feature_select_strategy)
        if image_sizes is None:
            raise RequestError(
                "pixel_values came without image_sizes, which say how a picture was tiled; pass both on as the "
                "processor made them"
            )
        compression: Compression = self.model.compression
        grids = [compression.grid(*size) for size in torch.as_tensor(image_sizes).tolist()]
        pixel_values, tiles = _without_padding(pixel_values, [1 + columns * rows for columns, rows in grids])
        return reduced_features(self.model, compression, pixel_values, tiles, [columns for columns, _ in grids])


class PlaceholderMask(_MethodOf):
    """``get_placeholder_mask`` of a compressed model: as the class's own, with an error that says what to do."""

    def __call__(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """Where ``image_features`` [tokens, hidden] go in the prompts. Raises RequestError where the numbers differ."""
        try:
            return type(self.model).get_placeholder_mask(self.model, input_ids, inputs_embeds, image_features)
        except ValueError as error:
            held = "another number of" if input_ids is None else int((input_ids == self.config.image_token_id).sum())
            raise RequestError(
                f"the prompts hold {held} image tokens and their pictures give {len(image_features)}: make prompts and "
                "pixel_values together, with the processor that vz_edge.compress(model, ...) returned for this model"
            ) from error


FEATURES_OF = {"llava": LlavaFeatures, "llava_next": LlavaNextFeatures}
# On the CPU the activations of two tiles of CLIP-L are below malloc's largest threshold, so that their memory is used
# again; those of more come from the system, page by page, in every layer: 2 at a time take 0.9 of the time of 5.
TILES_AT_ONCE = 2
ATTRIBUTES = ("compression", "get_image_features", "get_placeholder_mask")


def attach(model: Any, compression: Compression) -> None:
    """Compress the inner model ``model``."""
    model.compression = compression
    model.get_image_features = FEATURES_OF[compression.family](model)
    model.get_placeholder_mask = PlaceholderMask(model)


def detach(model: Any) -> None:
    """Undo ``attach``."""
    for name in ATTRIBUTES:
        delattr(model, name)


def compression_of(model: Any) -> Compression | None:
    """How the inner model ``model`` is compressed, None where it is not."""
    found = getattr(model, "compression", None)
    return found if isinstance(found, Compression) else None


def reduced_features(
    model: Any, compression: Compression, pixel_values: Tensor, tiles: list[int], grid_widths: list[int]
) -> CompressedFeatures:
    """Features of pictures with ``tiles`` tiles each; ``pixel_values`` [sum of tiles, 3, s, s].

    Of ``model`` its vision_tower, multi_modal_projector and image_newline are used, whatever else it has.
    """
    family, budget = FAMILIES[compression.family], compression.budget
    hidden, query, key = tower_states(model.vision_tower, pixel_values, compression.states_read)
    heads = compression.tower.heads
    selection = select(hidden, cls_scores(query, key, heads), mean_keys(key, heads), budget)
    tokens = torch.cat([selection.dominant, selection.contextual], dim=1).split(tiles)
    kept = selection.kept.split(tiles)
    per_side = compression.tower.patches_per_side
    ordered = [family.arrange(*picture, per_side) for picture in zip(tokens, kept, grid_widths, strict=True)]
    features = model.multi_modal_projector(torch.cat(ordered)).split([budget.total(count) for count in tiles])
    if family.HAS_GRID:
        features = tuple(_newline_if_one_tile(model, *picture) for picture in zip(features, tiles, strict=True))
    return CompressedFeatures(pooler_output=list(features), kept=kept)


def tower_states(tower: nn.Module, pixel_values: Tensor, states_read: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``states_read`` (as in ModelSpec) side by side [t, 1 + p, n * d], CLS query [t, d] and keys.

    Query and keys [t, 1 + p, d] are those of the last layer that runs. They carry no gradient: they only decide which
    tokens are kept and merged. On the CPU a few tiles are encoded at a time.
    """
    if pixel_values.device.type == "cpu" and len(pixel_values) > TILES_AT_ONCE:
        parts = [tower_states(tower, some, states_read) for some in pixel_values.split(TILES_AT_ONCE)]
        hidden, query, key = map(torch.cat, zip(*parts, strict=True))
        return hidden, query, key
    clip: Any = getattr(tower, "vision_model", tower)  # one level deeper in early releases of transformers 5
    hidden = before = clip.pre_layrnorm(clip.embeddings(pixel_values))
    states = [hidden]
    for layer in islice(clip.encoder.layers, max(states_read)):
        before, hidden = hidden, layer(hidden, None)
        states.append(hidden if len(states) in states_read else None)
    with torch.no_grad():
        normed = layer.layer_norm1(before)
        query, key = layer.self_attn.q_proj(normed[:, :1])[:, 0], layer.self_attn.k_proj(normed)
    return torch.cat([states[index] for index in states_read], dim=-1), query, key


def _newline_if_one_tile(model: Any, features: Tensor, tiles: int) -> Tensor:
    """As in the vision graph: a picture without a grid, in a family that has one, ends with the newline embedding."""
    return torch.cat([features, model.image_newline[None].to(features)]) if tiles == 1 else features


def _without_padding(pixel_values: Tensor, tiles: list[int]) -> tuple[Tensor, list[int]]:
    """``pixel_values`` as [tiles, 3, s, s], and the tiles of each picture: ``tiles``, or one where there is no grid."""
    if pixel_values.dim() == 4 and len(pixel_values) == sum(tiles):
        return pixel_values, tiles
    if pixel_values.dim() == 5 and len(pixel_values) == len(tiles):
        tiles = [1] * len(tiles) if pixel_values.shape[1] == 1 else tiles
        if pixel_values.shape[1] >= max(tiles):
            return torch.cat([picture[:count] for picture, count in zip(pixel_values, tiles, strict=True)]), tiles
    raise RequestError(
        f"pixel_values of shape {list(pixel_values.shape)} do not belong to image_sizes, which say {tiles} tiles: pass "
        "both as the processor that vz_edge.compress returned made them"
    )


def _check_request(config: Any, feature_layer: int | list[int] | None, strategy: str | None) -> None:
    if feature_layer not in (None, config.vision_feature_layer):
        raise RequestError(
            f"vision_feature_layer {feature_layer!r}: a compressed model reads the layer of its config, "
            f"{config.vision_feature_layer}; leave the argument out, or vz_edge.restore(model) first"
        )
    if strategy not in (None, config.vision_feature_select_strategy):
        raise RequestError(
            f"vision_feature_select_strategy {strategy!r}: a compressed model selects tokens itself; leave the "
            "argument out, or vz_edge.restore(model) first"
        )
