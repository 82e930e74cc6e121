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

from vz_edge.errors import CheckpointError, UnsupportedModelError
from vz_edge.host import original_llava
from vz_edge.host.decoder_spec import DECODER_TYPES
from vz_edge.host.families import llava, llava_next
from vz_edge.host.fields import check_config, check_original_config
from vz_edge.recipe import ModelSpec

FAMILIES: dict[str, ModuleType] = {"llava": llava, "llava_next": llava_next}


def family_of(config: dict[str, Any]) -> ModuleType:
    """The family's module for a transformers ``config.json``. Raises UnsupportedModelError listing what there is."""
    for family in FAMILIES.values():
        if config.get("model_type") in family.MODEL_TYPES:
            return family
    raise _unsupported(config.get("model_type"))


def check_family(config: dict[str, Any]) -> None:
    """Raise UnsupportedModelError unless there is a family for a ``config.json`` of transformers or the original code.

    Raises CheckpointError for one of the original code that says nothing of its tower.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise _unsupported(model_type)
    is_original = model_type in original_llava.DECODER_TYPES
    if "mm_vision_tower" in config:
        if not is_original:
            raise _unsupported(model_type)
    elif is_original and model_type not in {name for family in FAMILIES.values() for name in family.MODEL_TYPES}:
        raise CheckpointError(
            f"config.json says model_type {model_type!r} and has no mm_vision_tower; expected a config as the original "
            "LLaVA code saves it"
        )
    else:
        family_of(config)


def _unsupported(model_type: Any) -> UnsupportedModelError:
    supported = sorted(name for family in FAMILIES.values() for name in family.MODEL_TYPES)
    alone = " (a language model without a vision tower)" if str(model_type) in DECODER_TYPES else ""
    return UnsupportedModelError(
        f"model_type {model_type!r}{alone} is not supported; supported are {', '.join(supported)}, and checkpoints of "
        f"the original LLaVA code ({', '.join(sorted(original_llava.DECODER_TYPES))})"
    )


def spec_from_config(config: dict[str, Any], tower_config: dict[str, Any] | None = None) -> ModelSpec:
    """The architecture in a ``config.json`` of transformers or of the original LLaVA code.

    ``tower_config`` is the ``config.json`` of a separate vision tower, which only the original code has. Raises
    UnsupportedModelError where there is no graph for it, CheckpointError where the config is broken.
    """
    check_family(config)
    translated = original_llava.in_transformers_terms(config, tower_config)
    spec: ModelSpec = family_of(translated).spec_from_config(translated)
    return spec


def unknown_fields(config: dict[str, Any]) -> list[str]:
    """The fields of a config.json that no table has. Raises as ``vz_edge.host.fields.check_fields``."""
    if original_llava.is_original(config):
        return check_original_config(config, original_llava.DECODER_TYPES[config["model_type"]])
    return check_config(config)


def arrange_tokens(spec: ModelSpec, tokens: Tensor, kept: Tensor, grid_width: Tensor | int | None) -> Tensor:
    """``tokens`` [tiles, dominant + contextual, d] in the decoder's order, [tokens, d].

    ``kept`` [tiles, dominant] are their positions; ``grid_width`` (tiles a row) may be None in a family without
    a grid.
    """
    arranged: Tensor = FAMILIES[spec.family].arrange(tokens, kept, grid_width, spec.tower.patches_per_side)
    return arranged
