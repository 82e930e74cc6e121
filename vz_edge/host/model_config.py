"""From transformers' config of a vision-language model to a :class:`~vz_edge.recipe.ModelSpec`.

A ``config.json`` on the hub says only what differs from the defaults of the class it was saved with, so it is
transformers' own classes that fill the gaps.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

from vz_edge.errors import CheckpointError, UnsupportedModelError
from vz_edge.host.decoder_spec import DECODER_TYPES, decoder_spec
from vz_edge.recipe import ModelSpec, TowerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOWER_TYPES = {"clip_vision_model": "clip"}


def model_spec(
    family: Literal["llava", "llava_next"], config_class: type[PreTrainedConfig], config: dict[str, Any]
) -> ModelSpec:
    """Read ``config`` with transformers' ``config_class``.

    Raises UnsupportedModelError where there is no graph for it, CheckpointError where transformers refuses it.
    """
    require("vision_config.model_type", _model_type(config, "vision_config", "clip_vision_model"), *TOWER_TYPES)
    require("text_config.model_type", _model_type(config, "text_config", "llama"), *DECODER_TYPES)
    try:
        full: Any = config_class(**copy.deepcopy(config))  # transformers adds to the mappings that it is given
    except Exception as error:  # each check in transformers has its own exception
        reason = " ".join(str(error).split())
        raise CheckpointError(f"config.json is not a valid {config_class.model_type} config: {reason}") from error
    require("projector_hidden_act", full.projector_hidden_act, "gelu")
    require("multimodal_projector_bias", full.multimodal_projector_bias, True)
    require("vision_feature_select_strategy", full.vision_feature_select_strategy, "default")
    tower = tower_spec(full.vision_config)
    pinpoints = getattr(full, "image_grid_pinpoints", ())
    return ModelSpec(
        family=family,
        decoder=decoder_spec(full.text_config, tie_word_embeddings=full.tie_word_embeddings),
        image_token_id=full.image_token_index,
        tower=tower,
        feature_layer=feature_layer(full.vision_feature_layer, tower),
        grid_pinpoints=tuple((int(height), int(width)) for height, width in pinpoints),
    )


def tower_spec(vision: PreTrainedConfig) -> TowerSpec:
    """The tower in a ``vision_config``. Raises UnsupportedModelError."""
    config: Any = vision
    require("vision_config.num_channels", config.num_channels, 3)
    require("vision_config.hidden_act", config.hidden_act, "quick_gelu", "gelu")
    return TowerSpec(
        type="clip",
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        activation=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
    )


def require(name: str, value: Any, *supported: Any) -> None:
    """Raise UnsupportedModelError unless ``value`` is one of ``supported``."""
    if value not in supported:
        raise UnsupportedModelError(
            f"{name} {value!r} is not supported; supported: {', '.join(repr(option) for option in supported)}"
        )


def feature_layer(layer: Any, tower: TowerSpec) -> int:
    """The one feature layer; it must be the output of a layer, whose attention ranks the tokens.

    Raises UnsupportedModelError.
    """
    if not isinstance(layer, int) or not -tower.layers <= layer <= tower.layers or layer == 0:
        raise UnsupportedModelError(
            f"vision_feature_layer {layer!r} is not supported; expected one layer from {-tower.layers} to -1 or "
            f"1 to {tower.layers}"
        )
    return layer


def _model_type(config: dict[str, Any], part: str, default: str) -> Any:
    return (config.get(part) or {}).get("model_type", default)
