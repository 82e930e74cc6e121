"""LLaVA-NeXT (1.6), "anyres": the whole picture as one small base tile, then a grid of tiles at full resolution.

Source: the LLaVA-NeXT release of January 2024. The order of reduced tokens is that of VisionZip's published code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vz_edge.host.model_config import model_spec
from vz_edge.recipe import ModelSpec

MODEL_TYPES = ("llava_next",)
HAS_GRID = True


def spec_from_config(config: dict[str, Any]) -> ModelSpec:
    """The architecture in a transformers ``config.json``. Raises UnsupportedModelError."""
    from transformers import LlavaNextConfig

    return model_spec("llava_next", LlavaNextConfig, config)


def arrange(tokens: Tensor, kept: Tensor, grid_width: Tensor | int, patches_per_side: int) -> Tensor:
    """Tokens in the decoder's order, [tiles * (dominant + contextual), d].

    ``tokens`` [tiles, dominant + contextual, d] has the base tile first, then the grid row by row; ``kept``
    [tiles, dominant] are their positions in a tile, CLS first; ``grid_width`` (an int, or [1] int64) is the
    number of tiles in a row of the grid, at least 1.

    The base tile comes as it is. Then the kept patches of the grid tiles in row-major order of the *whole*
    grid, as if its tiles were one picture: a line of patches runs across neighbouring tiles. Then the grid
    tiles' CLS tokens, and last their contextual tokens.
    """
    dominant = kept.shape[1]
    patch = kept[1:, 1:] - 1
    tile = torch.arange(patch.shape[0], device=kept.device).unsqueeze(1)
    tile_column, patch_column = tile % grid_width, patch % patches_per_side
    # How many patches of the whole grid come before this one, written without a division: whole bands of tiles,
    # whole lines of patches within the band, then patches within the line.
    before_band = (tile - tile_column) * patches_per_side**2
    before_line = (patch - patch_column) * grid_width
    place = before_band + before_line + tile_column * patches_per_side + patch_column
    patches = tokens[1:, 1:dominant].flatten(0, 1).index_select(0, place.flatten().argsort())
    return torch.cat([tokens[0], patches, tokens[1:, 0], tokens[1:, dominant:].flatten(0, 1)])
