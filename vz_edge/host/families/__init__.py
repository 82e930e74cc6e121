"""Model families: one file each, named after its ``model_type``, all with the same names.

========================  ==========================================================================
``MODEL_TYPES``           the ``model_type`` values of ``config.json`` that it reads
``HAS_GRID``              whether a picture is a grid of tiles (the vision graph then asks its width)
``spec_from_config``      ``config.json`` as a :class:`~vz_edge.recipe.ModelSpec`
``arrange``               the order in which the decoder gets the tokens kept of each tile
========================  ==========================================================================

Checkpoints of the original LLaVA code are read as well: their config is first put into transformers' words.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from vz_edge.errors import UnsupportedModelError
from vz_edge.host import original_llava
from vz_edge.host.families import llava, llava_next
from vz_edge.recipe import ModelSpec

FAMILIES: dict[str, ModuleType] = {"llava": llava, "llava_next": llava_next}


def family_of(config: dict[str, Any]) -> ModuleType:
    """The family's module for a transformers ``config.json``. Raises UnsupportedModelError listing what there is."""
    for family in FAMILIES.values():
        if config.get("model_type") in family.MODEL_TYPES:
            return family
    supported = sorted(name for family in FAMILIES.values() for name in family.MODEL_TYPES)
    raise UnsupportedModelError(
        f"model_type {config.get('model_type')!r} is not supported; supported are {', '.join(supported)}, and "
        f"checkpoints of the original LLaVA code ({', '.join(sorted(original_llava.DECODER_TYPES))})"
    )


def spec_from_config(config: dict[str, Any], tower_config: dict[str, Any] | None = None) -> ModelSpec:
    """The architecture in a ``config.json`` of transformers or of the original LLaVA code.

    ``tower_config`` is the ``config.json`` of a separate vision tower, which only the original code has. Raises
    UnsupportedModelError where there is no graph for it, CheckpointError where the config is broken.
    """
    translated = original_llava.in_transformers_terms(config, tower_config)
    spec: ModelSpec = family_of(translated).spec_from_config(translated)
    return spec


def arrange_tokens(spec: ModelSpec, tokens: Tensor, kept: Tensor, grid_width: Tensor | int | None) -> Tensor:
    """``tokens`` [tiles, dominant + contextual, d] in the decoder's order, [tokens, d].

    ``kept`` [tiles, dominant] are their positions; ``grid_width`` (tiles a row) may be None in a family without
    a grid.
    """
    arranged: Tensor = FAMILIES[spec.family].arrange(tokens, kept, grid_width, spec.tower.patches_per_side)
    return arranged
