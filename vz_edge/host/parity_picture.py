"""The parity picture as torch sees it: tower, selection and projector on the checkpoint's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vz_edge.budget import TokenBudget
from vz_edge.bundle import ImageSpec
from vz_edge.device.image import Tiles, make_tiles, vanilla_token_order
from vz_edge.device.verify import parity_picture
from vz_edge.host import reference
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.families import arrange_tokens
from vz_edge.host.select.visionzip import select
from vz_edge.recipe import ModelSpec


@dataclass(frozen=True)
class Features:
    """What the decoder gets, ``tokens`` [tokens, hidden] in float32, and positions ``kept`` [tiles, dominant]."""

    tokens: torch.Tensor
    kept: torch.Tensor | None


@dataclass(frozen=True)
class Look:
    """The picture's tiles, the hidden states of all their tokens [tiles, tokens, feature width], and its features.

    The latter with each budget, the default first.
    """

    tiles: Tiles
    patches: torch.Tensor
    by_budget: tuple[Features, ...]


def look(checkpoint: Checkpoint, model: ModelSpec, image: ImageSpec, budgets: Sequence[TokenBudget]) -> Look:
    """Show torch the parity picture; no budgets: all tokens. Raises MissingTensorError and TensorShapeError."""
    tiles = make_tiles(parity_picture(), model, image)
    tower = reference.tower_states(checkpoint, model.tower, model.states_read, torch.from_numpy(tiles.pixel_values))
    patches = tower[0] if model.cls_is_token else tower[0][:, 1:]
    if not budgets:
        return Look(tiles, patches, (_all_features(checkpoint, model, tiles, patches),))
    selected = (_selected_features(checkpoint, model, tiles, tower, budget) for budget in budgets)
    return Look(tiles, patches, tuple(selected))


def _all_features(checkpoint: Checkpoint, model: ModelSpec, tiles: Tiles, patches: torch.Tensor) -> Features:
    features = reference.project(checkpoint, model, patches).flatten(0, 1)
    if tiles.grid is None:
        return Features(features, None)
    newline = checkpoint.weight("image_newline", (model.decoder.hidden_size,)).load()
    rows = torch.cat([features, newline.float()[None]])
    order = vanilla_token_order(tiles.original_size, tiles.grid, model.tower.patches_per_side)
    return Features(rows[torch.from_numpy(order)], None)


def _selected_features(
    checkpoint: Checkpoint,
    model: ModelSpec,
    tiles: Tiles,
    tower: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    budget: TokenBudget,
) -> Features:
    selection = select(*tower, budget)
    tokens = torch.cat([selection.dominant, selection.contextual], dim=1)
    ordered = arrange_tokens(model, tokens, selection.kept, None if tiles.grid is None else tiles.grid[0])
    return Features(reference.project(checkpoint, model, ordered), selection.kept)
