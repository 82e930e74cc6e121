"""Families: one contract over all of them, configs as the hub and the original code have them, the token order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_cases import CHECKPOINTS, model_spec
from vz_edge.errors import CheckpointError, UnsupportedModelError
from vz_edge.host.families import FAMILIES, arrange_tokens, family_of, spec_from_config
from vz_edge.recipe import ModelSpec, TowerSpec, load_recipe

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
VICUNA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
HUB: dict[str, dict[str, Any]] = {  # as on the hub: what the classes' defaults say is left out
    "llava-1.5-7b": {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": VICUNA_7B,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": CLIP_L,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    },
    "llava-next-mistral-7b": {
        "image_grid_pinpoints": PINPOINTS,
        "image_token_index": 32000,
        "model_type": "llava_next",
        "text_config": {
            "model_type": "mistral",
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "vocab_size": 32064,
        },
        "use_image_newline_parameter": True,
        "vision_config": CLIP_L,
    },
    "llava-next-34b": {
        "image_token_id": 64000,
        "model_type": "llava_next",
        "text_config": {
            "model_type": "llama",
            "hidden_size": 7168,
            "intermediate_size": 20480,
            "max_position_embeddings": 4096,
            "num_attention_heads": 56,
            "num_hidden_layers": 60,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default"},
            "vocab_size": 64064,
        },
    },
}
ORIGINAL: dict[str, Any] = {
    "_name_or_path": "vicuna-7b-v1.5",
    "architectures": ["LlavaLlamaForCausalLM"],
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "intermediate_size": 11008,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
NARROW_PINPOINTS = [[336, 672], [672, 672], [336, 1008]]  # (width, height)


def text(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llava", "text_config": VICUNA_7B | changes}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_the_contract(name: str) -> None:
    family = FAMILIES[name]
    for model_type in family.MODEL_TYPES:
        assert family_of({"model_type": model_type}) is family
        spec = spec_from_config({"model_type": model_type})
        assert spec.family == name
        assert bool(spec.grid_pinpoints) == family.HAS_GRID
        assert spec.tower == TowerSpec()
    tokens, kept = torch.randn(5, 6, 3), torch.tensor([[0, 3, 7, 20]] * 5)
    arranged = family.arrange(tokens, kept, torch.tensor([2]), 24)
    assert arranged.shape == (30, 3)
    assert sorted(arranged.tolist()) == sorted(tokens.flatten(0, 1).tolist())
    assert torch.equal(arranged[:6], tokens[0])


@pytest.mark.parametrize("name", HUB)
def test_configs_of_the_hub_are_what_the_recipes_say(name: str) -> None:
    assert spec_from_config(HUB[name]) == load_recipe(name).model


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_golden_configs(checkpoint: str) -> None:
    spec = model_spec(checkpoint)
    assert (spec.decoder.hidden_size, spec.decoder.head_dim, spec.image_token_id) == (48, 12, 511)
    assert spec.tower.layers == 24
    assert spec.max_tiles == (5 if checkpoint == "llava-next" else 1)


def test_original_llava_1_5() -> None:
    spec = spec_from_config(ORIGINAL)
    published = load_recipe("llava-1.5-7b").model
    assert spec.tower == published.tower
    assert spec.family == "llava"
    assert spec.image_token_id == spec.decoder.vocab_size == 32000
    assert spec.decoder.rms_norm_eps == 1e-5
    assert spec.decoder.context_length == 4096


def test_original_pinpoints_are_width_and_height() -> None:
    spec = spec_from_config(ORIGINAL | ANYRES | {"image_grid_pinpoints": NARROW_PINPOINTS})
    assert spec.family == "llava_next"
    assert spec.grid_pinpoints == ((672, 336), (672, 672), (1008, 336))
    as_text = spec_from_config(ORIGINAL | ANYRES | {"image_grid_pinpoints": str(NARROW_PINPOINTS)})
    assert as_text.grid_pinpoints == spec.grid_pinpoints


def test_original_decoders() -> None:
    mistral = ORIGINAL | {"model_type": "llava_mistral", "num_key_value_heads": 8, "sliding_window": 4096}
    assert spec_from_config(mistral).decoder.type == "mistral"
    assert spec_from_config(mistral).decoder.sliding_window == 4096
    qwen = spec_from_config(ORIGINAL | {"model_type": "llava_qwen", "use_sliding_window": False})
    assert (qwen.decoder.type, qwen.decoder.qkv_bias, qwen.decoder.output_bias) == ("qwen2", True, False)


@pytest.mark.parametrize("nested", [False, True])
def test_a_separate_tower_has_its_own_config(nested: bool) -> None:
    tower = CLIP_L | {"hidden_size": 768, "num_attention_heads": 12, "image_size": 224}
    config = ORIGINAL | {"mm_vision_tower": "mine"}
    spec = spec_from_config(config, {"model_type": "clip", "vision_config": tower} if nested else tower)
    assert (spec.tower.hidden_size, spec.tower.heads, spec.tower.patches) == (768, 12, 256)


def test_decoder_variants() -> None:
    linear = spec_from_config(text(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5e5)).decoder
    assert linear.rope_theta == 5e5
    assert linear.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 2048}
    llama3 = {"rope_type": "llama3", **numbers}
    older = spec_from_config(text(rope_scaling=llama3, rope_theta=5e5)).decoder
    newer = spec_from_config(text(rope_parameters=llama3 | {"rope_theta": 5e5})).decoder
    assert older == newer
    assert older.rope_scaling == llama3
    biased = spec_from_config(text(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=64)).decoder
    assert (biased.qkv_bias, biased.output_bias, biased.mlp_bias, biased.tie_word_embeddings) == (True,) * 4
    assert biased.head_dim == 64
    sliding = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}
    assert spec_from_config(text(**sliding)).decoder.sliding_window == 512


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "blip-2"}, "'blip-2' is not supported; supported are llava, llava_next"),
        ({}, "model_type None is not supported"),
        (
            text(model_type="gemma"),
            "text_config.model_type 'gemma' is not supported; supported: 'llama', 'mistral', 'q",
        ),
        (text(hidden_act="relu"), "hidden_act 'relu'"),
        (text(rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}), "partial"),
        (
            text(model_type="qwen2", use_sliding_window=True, sliding_window=512, max_window_layers=3),
            "layer_types mixes",
        ),
        ({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}, "'siglip_vision_model'"),
        ({"model_type": "llava", "vision_config": CLIP_L | {"hidden_act": "relu"}}, "hidden_act 'relu'"),
        ({"model_type": "llava", "projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        ({"model_type": "llava_next", "vision_feature_select_strategy": "full"}, "select_strategy 'full'"),
        ({"model_type": "llava_next", "image_grid_pinpoints": [[336, 600]]}, r"multiples of the tile's 336 pixels"),
        ({"model_type": "llava", "vision_feature_layer": [-2, -26]}, r"vision_feature_layer \[-2, -26\]"),
        ({"model_type": "llava", "vision_feature_layer": []}, r"vision_feature_layer \[\]"),
        ({"model_type": "llava", "vision_feature_layer": 0}, "vision_feature_layer 0"),
        ({"model_type": "llava", "vision_feature_layer": -25}, "vision_feature_layer -25"),
        (ORIGINAL | {"model_type": "llava_mpt"}, "'llava_mpt'"),
        (ORIGINAL | {"mm_projector_type": "linear"}, "mm_projector_type 'linear' is not supported; only 'mlp2x_gelu'"),
        (ORIGINAL | {"mm_use_im_start_end": True}, "mm_use_im_start_end True"),
        (ORIGINAL | {"mm_vision_tower": "google/siglip-so400m"}, "mm_vision_tower 'google/siglip-so400m'"),
        (ORIGINAL | {"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio 'anyres_max_9'"),
        (ORIGINAL | {"image_aspect_ratio": "anyres"}, "mm_patch_merge_type 'flat'"),
    ],
)
def test_unsupported_architectures(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        spec_from_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        text(hidden_size="wide"),
        {"model_type": "llava", "vision_config": CLIP_L | {"num_attention_heads": 7}},
        ORIGINAL | ANYRES,
        {key: value for key, value in ORIGINAL.items() if key != "vocab_size"},
    ],
)
def test_broken_configs(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        spec_from_config(config)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(0, 2**31), st.data())
def test_anyres_order_is_row_major_over_the_whole_grid(
    columns: int, rows: int, side: int, seed: int, data: st.DataObject
) -> None:
    """Every token carries its tile, its kind and its place, and is found where a picture would have it."""
    dominant, contextual = data.draw(st.integers(2, side * side)), data.draw(st.integers(1, 4))
    tiles = 1 + columns * rows
    random = torch.Generator().manual_seed(seed)
    patches = [torch.randperm(side * side, generator=random)[: dominant - 1].sort().values + 1 for _ in range(tiles)]
    kept = torch.stack([torch.cat([torch.tensor([0]), patch]) for patch in patches])
    labels = torch.arange(tiles * (dominant + contextual)).view(tiles, dominant + contextual, 1)

    places = {}
    for tile in range(1, tiles):
        tile_row, tile_column = divmod(tile - 1, columns)
        for slot in range(1, dominant):
            row, column = divmod(int(kept[tile, slot]) - 1, side)
            places[(tile_row * side + row, tile_column * side + column)] = int(labels[tile, slot])
    expected = [
        *labels[0].flatten().tolist(),
        *(label for _, label in sorted(places.items())),
        *labels[1:, 0].flatten().tolist(),
        *labels[1:, dominant:].flatten().tolist(),
    ]
    tower = TowerSpec(image_size=side * 14)
    spec = ModelSpec("llava_next", load_recipe("llava-next-7b").model.decoder, 0, tower=tower, grid_pinpoints=((1, 1),))
    for width in (columns, torch.tensor([columns])):
        assert arrange_tokens(spec, labels, kept, width).flatten().tolist() == expected
