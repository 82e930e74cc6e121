"""Checkpoints of the original LLaVA code: their config in transformers' words.

The original puts the decoder's keys at the top level, beside ``mm_*`` keys for everything visual, and grid
pinpoints as (width, height) where transformers has (height, width). Its ``model_type`` can be ``llava`` for
LLaVA-1.5 and 1.6 alike: ``image_aspect_ratio: anyres`` tells them apart.
"""

from __future__ import annotations

import ast
import re
from typing import Any, Literal

from vz_edge.errors import CheckpointError, UnsupportedModelError
from vz_edge.host.fields import check_original_config

DECODER_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
TEXT_KEYS = (
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "max_window_layers", "mlp_bias", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "original_max_position_embeddings", "partial_rotary_factor", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings", "use_sliding_window",
    "vocab_size",
)  # fmt: skip
SELECTED_FEATURES = {"patch": "default", "cls_patch": "full"}
# What becomes of a picture (llava/mm_utils.py, process_images); any other value is the processor's own crop too, but
# belongs to models with other ways to pack tokens.
ASPECT_RATIOS = (None, "square", "pad", "anyres")
USUAL_TOWER = "clip-vit-large-patch14-336"  # TowerSpec's defaults
USUAL_SIDE = 336


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is one of the original code."""
    return "mm_vision_tower" in config


def is_usual_tower(name: str) -> bool:
    """Whether ``mm_vision_tower`` names the tower that every published checkpoint has."""
    return name.rstrip("/").endswith(USUAL_TOWER)


def image_mode(config: dict[str, Any]) -> Literal["stock", "pad"]:
    """What an original config says about pictures that are no squares."""
    return "pad" if config.get("image_aspect_ratio") == "pad" else "stock"


def in_transformers_terms(config: dict[str, Any], tower_config: dict[str, Any] | None) -> dict[str, Any]:
    """The config as transformers would have it; returned as it is where it already is transformers' own.

    The tower is what ``tower_config`` says (the config.json of the CLIP repository that ``mm_vision_tower``
    names), else the usual CLIP ViT-L/14-336. The original vocabulary has no image token, so the first id after it
    is taken, as transformers' conversions do. Raises UnsupportedModelError, CheckpointError.
    """
    if not is_original(config):
        return config
    decoder_type = DECODER_TYPES[config["model_type"]]
    check_original_config(config, decoder_type)
    _check(config, tower_config)
    vision = tower_config.get("vision_config", tower_config) if tower_config else None
    translated = {
        "model_type": "llava",
        "text_config": {"model_type": decoder_type} | {key: config[key] for key in TEXT_KEYS if key in config},
        "vision_config": vision,
        "image_token_index": _required(config, "vocab_size"),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": SELECTED_FEATURES[config.get("mm_vision_select_feature", "patch")],
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }
    if config.get("image_aspect_ratio") != "anyres":
        return translated
    side = vision.get("image_size", USUAL_SIDE) if vision else USUAL_SIDE
    pinpoints = _pinpoints(_required(config, "image_grid_pinpoints"), side)
    return translated | {"model_type": "llava_next", "image_grid_pinpoints": pinpoints}


def _pinpoints(found: Any, side: int) -> list[list[Any]]:
    """Grid pinpoints as (height, width): of a list of (width, height), its text, or a range "(1x1),...,(6x6)".

    A range holds the numbers of tiles across and down, from the first to the last (LLaVA-NeXT's llava/mm_utils.py,
    process_anyres_image). Raises CheckpointError.
    """
    try:
        ends = [tuple(map(int, end)) for end in re.findall(r"\((\d+)x(\d+)\)", found)] if isinstance(found, str) else []
        if ends:
            (first_columns, first_rows), (last_columns, last_rows) = ends[0], ends[-1]
            across, down = range(first_columns, last_columns + 1), range(first_rows, last_rows + 1)
            listed = [(columns * side, rows * side) for columns in across for rows in down]
        else:
            listed = ast.literal_eval(found) if isinstance(found, str) else found
        pinpoints = [[height, width] for width, height in listed]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pinpoints = []
    if not pinpoints:
        raise CheckpointError(
            f"config.json: image_grid_pinpoints is {found!r}; expected a list of [width, height] in pixels, or a range "
            "of tiles as (1x1),...,(6x6)"
        )
    return pinpoints


def _required(config: dict[str, Any], key: str) -> Any:
    if key not in config:
        raise CheckpointError(f"config.json has no {key}; expected a config as the original LLaVA code saves it")
    return config[key]


def _check(config: dict[str, Any], tower_config: dict[str, Any] | None) -> None:
    _require("mm_projector_type", config.get("mm_projector_type", "mlp2x_gelu"), ("mlp2x_gelu",))
    _require("mm_vision_select_feature", config.get("mm_vision_select_feature", "patch"), tuple(SELECTED_FEATURES))
    if tower_config is None and not is_usual_tower(str(config["mm_vision_tower"])):
        raise UnsupportedModelError(
            f"mm_vision_tower {config['mm_vision_tower']!r} is not known; expected {USUAL_TOWER}, or the tower's "
            "own repository with its config.json"
        )
    aspect_ratio, merge_type = config.get("image_aspect_ratio"), config.get("mm_patch_merge_type", "flat")
    _require("image_aspect_ratio", aspect_ratio, ASPECT_RATIOS)
    if aspect_ratio == "anyres":
        _require("mm_patch_merge_type", merge_type, ("spatial_unpad",))


def _require(name: str, value: Any, supported: tuple[Any, ...]) -> None:
    if value not in supported:
        raise UnsupportedModelError(
            f"{name} {value!r} is not supported; only {' or '.join(repr(option) for option in supported if option)} is"
        )
