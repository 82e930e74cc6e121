"""Checkpoints of the original LLaVA code: their config in transformers' words.

The original puts the decoder's keys at the top level, beside ``mm_*`` keys for everything visual, and grid
pinpoints as (width, height) where transformers has (height, width). Its ``model_type`` can be ``llava`` for
LLaVA-1.5 and 1.6 alike: ``image_aspect_ratio: anyres`` tells them apart.
"""

from __future__ import annotations

import ast
from typing import Any

from vz_edge.errors import CheckpointError, UnsupportedModelError

DECODER_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
TEXT_KEYS = (
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings",
    "max_window_layers", "mlp_bias", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings", "use_sliding_window",
    "vocab_size",
)  # fmt: skip
REQUIRED = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
}
USUAL_TOWER = "clip-vit-large-patch14-336"  # TowerSpec's defaults


def in_transformers_terms(config: dict[str, Any], tower_config: dict[str, Any] | None) -> dict[str, Any]:
    """The config as transformers would have it; returned as it is where it already is transformers' own.

    The tower is what ``tower_config`` says (the config.json of the CLIP repository that ``mm_vision_tower``
    names), else the usual CLIP ViT-L/14-336. The original vocabulary has no image token, so the first id after it
    is taken, as transformers' conversions do. Raises UnsupportedModelError, CheckpointError.
    """
    if "mm_vision_tower" not in config:
        return config
    _check(config, tower_config)
    decoder_type = DECODER_TYPES[config["model_type"]]
    translated = {
        "model_type": "llava",
        "text_config": {"model_type": decoder_type} | {key: config[key] for key in TEXT_KEYS if key in config},
        "vision_config": tower_config.get("vision_config", tower_config) if tower_config else None,
        "image_token_index": _required(config, "vocab_size"),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }
    if config.get("image_aspect_ratio") != "anyres":
        return translated
    pinpoints = _required(config, "image_grid_pinpoints")
    if isinstance(pinpoints, str):
        pinpoints = ast.literal_eval(pinpoints)
    grid = {"image_grid_pinpoints": [[height, width] for width, height in pinpoints]}
    return translated | {"model_type": "llava_next"} | grid


def _required(config: dict[str, Any], key: str) -> Any:
    if key not in config:
        raise CheckpointError(f"config.json has no {key}; expected a config as the original LLaVA code saves it")
    return config[key]


def _check(config: dict[str, Any], tower_config: dict[str, Any] | None) -> None:
    if config.get("model_type") not in DECODER_TYPES:
        raise UnsupportedModelError(
            f"original LLaVA model_type {config.get('model_type')!r} is not supported; supported are "
            f"{', '.join(sorted(DECODER_TYPES))}"
        )
    for key, expected in REQUIRED.items():
        if config.get(key, expected) != expected:
            raise UnsupportedModelError(f"{key} {config[key]!r} is not supported; only {expected!r} is")
    if tower_config is None and not str(config["mm_vision_tower"]).rstrip("/").endswith(USUAL_TOWER):
        raise UnsupportedModelError(
            f"mm_vision_tower {config['mm_vision_tower']!r} is not known; expected {USUAL_TOWER}, or the tower's "
            "own repository with its config.json"
        )
    aspect_ratio, merge_type = config.get("image_aspect_ratio"), config.get("mm_patch_merge_type", "flat")
    if aspect_ratio == "anyres" and merge_type != "spatial_unpad":
        raise UnsupportedModelError(
            f"mm_patch_merge_type {merge_type!r} is not supported with image_aspect_ratio 'anyres'; only "
            "'spatial_unpad' is"
        )
    if aspect_ratio not in (None, "square", "pad", "anyres"):
        raise UnsupportedModelError(
            f"image_aspect_ratio {aspect_ratio!r} is not supported; supported are square, pad and anyres"
        )
