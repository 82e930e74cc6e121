"""LLaVA-1.5: a picture is one tile, and its tokens go to the decoder as they are.

Source: "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744. Several tiles (frames of a video)
follow one another.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vz_edge.host.model_config import model_spec
from vz_edge.recipe import ModelSpec

MODEL_TYPES = ("llava",)
HAS_GRID = False


def spec_from_config(config: dict[str, Any]) -> ModelSpec:
    """The architecture in a transformers ``config.json``. Raises UnsupportedModelError."""
    from transformers import LlavaConfig

    return model_spec("llava", LlavaConfig, config)


def arrange(tokens: Tensor, kept: Tensor, grid_width: Tensor | int | None, patches_per_side: int) -> Tensor:
    """``tokens`` [tiles, dominant + contextual, d] in the decoder's order, [tokens, d]: tile after tile."""
    return tokens.flatten(0, 1)
