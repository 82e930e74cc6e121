"""From transformers' config of a vision-language model to a :class:`~vz_edge.recipe.ModelSpec`.

A ``config.json`` on the hub says only what differs from the defaults of the class it was saved with, so it is
transformers' own classes that fill the gaps.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

from vz_edge.errors import CheckpointError, UnsupportedModelError
from vz_edge.host.decoder_spec import DECODER_TYPES, decoder_spec
from vz_edge.host.fields import check_config, positive, whole_number
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
    check_config(config)
    require("vision_config.model_type", _model_type(config, "vision_config", "clip_vision_model"), *TOWER_TYPES)
    require("text_config.model_type", _model_type(config, "text_config", "llama"), *DECODER_TYPES)
    try:
        full: Any = config_class(**copy.deepcopy(config))  # transformers adds to the mappings that it is given
    except Exception as error:  # each check in transformers has its own exception
        reason = " ".join(str(error).split())
        raise CheckpointError(f"config.json is not a valid {config_class.model_type} config: {reason}") from error
    require("projector_hidden_act", full.projector_hidden_act, "gelu")
    tower = tower_spec(full.vision_config)
    layers = feature_layers(full.vision_feature_layer, tower)
    with_cls = full.vision_feature_select_strategy == "full"
    if family == "llava_next" and with_cls:
        raise UnsupportedModelError(
            "vision_feature_select_strategy 'full' is not supported with a grid of tiles, in which CLS has no place; "
            "supported: 'default'"
        )
    return ModelSpec(
        family=family,
        decoder=decoder_spec(full.text_config, tie_word_embeddings=full.tie_word_embeddings),
        image_token_id=whole_number("image_token_index", full.image_token_index, smallest=0),
        tower=tower,
        feature_layer=deepest(layers, tower),
        grid_pinpoints=grid_pinpoints(getattr(full, "image_grid_pinpoints", ()), tower.image_size),
        feature_layers=layers if len(layers) > 1 else (),
        cls_is_token=with_cls,
        projector_bias=full.multimodal_projector_bias,
    )


def tower_spec(vision: PreTrainedConfig) -> TowerSpec:
    """The tower in a ``vision_config``. Raises UnsupportedModelError, CheckpointError."""
    config: Any = vision
    require("vision_config.num_channels", config.num_channels, 3)
    require("vision_config.hidden_act", config.hidden_act, "quick_gelu", "gelu")
    image_size, patch_size = (
        whole_number(f"vision_config.{name}", getattr(config, name)) for name in ("image_size", "patch_size")
    )
    if patch_size > image_size:
        raise CheckpointError(
            f"config.json: vision_config has patches of {patch_size} pixels in tiles of {image_size}; expected smaller"
        )
    return TowerSpec(
        type="clip",
        hidden_size=whole_number("vision_config.hidden_size", config.hidden_size),
        intermediate_size=whole_number("vision_config.intermediate_size", config.intermediate_size),
        layers=whole_number("vision_config.num_hidden_layers", config.num_hidden_layers),
        heads=whole_number("vision_config.num_attention_heads", config.num_attention_heads),
        image_size=image_size,
        patch_size=patch_size,
        activation=config.hidden_act,
        layer_norm_eps=positive("vision_config.layer_norm_eps", config.layer_norm_eps),
    )


def require(name: str, value: Any, *supported: Any) -> None:
    """Raise UnsupportedModelError unless ``value`` is one of ``supported``."""
    if value not in supported:
        raise UnsupportedModelError(
            f"{name} {value!r} is not supported; supported: {', '.join(repr(option) for option in supported)}"
        )


def feature_layers(layers: Any, tower: TowerSpec) -> tuple[int, ...]:
    """The feature layers, one or several; each a hidden state of the tower, 0 what its first layer reads.

    Raises UnsupportedModelError.
    """
    found = tuple(layers) if isinstance(layers, (list, tuple)) else (layers,)
    possible = range(-tower.layers - 1, tower.layers + 1)
    if not found or not all(type(layer) is int and layer in possible for layer in found):
        raise UnsupportedModelError(
            f"vision_feature_layer {layers!r} is not supported; expected layers from {possible[0]} to {possible[-1]}"
        )
    if not any(tower.layers_before(layer) for layer in found):
        raise UnsupportedModelError(
            f"vision_feature_layer {layers!r} is not supported: no layer's attention ranks the tokens; expected one "
            f"from {-tower.layers} to -1 or 1 to {tower.layers}"
        )
    return found


def deepest(layers: tuple[int, ...], tower: TowerSpec) -> int:
    """Of several feature layers the one that comes last in the tower."""
    return max(layers, key=tower.layers_before)


def grid_pinpoints(pinpoints: Any, side: int) -> tuple[tuple[int, int], ...]:
    """The resolutions (height, width) of a grid of tiles of ``side``. Raises CheckpointError, UnsupportedModelError."""
    try:
        found = tuple((height, width) for height, width in pinpoints)
    except (TypeError, ValueError):
        found = ((None, None),)
    if not all(type(length) is int and length > 0 for pair in found for length in pair):
        raise CheckpointError(
            f"config.json: image_grid_pinpoints is {pinpoints!r}; expected a list of [height, width] in pixels"
        )
    if any(length % side for pair in found for length in pair):
        raise UnsupportedModelError(
            f"image_grid_pinpoints {pinpoints!r} is not supported; expected multiples of the tile's {side} pixels"
        )
    return found


def _model_type(config: dict[str, Any], part: str, default: str) -> Any:
    return (config.get(part) or {}).get("model_type", default)
