"""Bytes of a bundle by part, from the architecture alone: arithmetic, no model needed.

The export states these before it starts and records them; a test holds them against real bundles.
"""

from __future__ import annotations

from vz_edge.bundle import WeightSpec
from vz_edge.recipe import DecoderSpec, ModelSpec

HOST_BASE_BYTES = 650_000_000  # Python, torch, transformers and onnx-ir before the first tensor (measured)
HOST_COPIES_OF_LARGEST = 14  # bytes of working memory per element of the largest tensor (measured)
ACTIVATION_BYTES = {"cpu": 4, "cuda": 2}


def bundle_bytes(model: ModelSpec, weights: WeightSpec, target: str) -> dict[str, int]:
    """Predicted bytes of a bundle's parts on disk: ``vision``, ``decoder``, ``lm_head``, ``embedding``."""
    activation = ACTIVATION_BYTES[target]
    decoder, tower = model.decoder, model.tower
    layers_in_graph = tower.layers + 1 + model.feature_layer
    width, mlp = tower.hidden_size, tower.intermediate_size
    tower_linear = layers_in_graph * (4 * width * width + 2 * width * mlp)
    projector_linear = width * decoder.hidden_size + decoder.hidden_size**2
    patch_and_position = 3 * tower.patch_size**2 * width + (tower.patches + 1) * width
    vision_small = patch_and_position + layers_in_graph * (9 * width + mlp)
    rotary_cache = decoder.context_length * decoder.head_dim
    return {
        "vision": round(
            (tower_linear + projector_linear) * weight_bytes(weights.vision_bits, weights.block_size, activation)
            + vision_small * activation
        ),
        "decoder": round(
            decoder_linear_elements(decoder) * weight_bytes(weights.bits, weights.block_size, activation)
            + (rotary_cache + 2 * decoder.layers * decoder.hidden_size) * activation
        ),
        "lm_head": round(
            decoder.vocab_size
            * decoder.hidden_size
            * weight_bytes(weights.lm_head_bits, weights.block_size, activation)
        ),
        "embedding": embedding_rows(model) * decoder.hidden_size * 2,
    }


def decoder_linear_elements(decoder: DecoderSpec) -> int:
    """Weights in the linear layers of all decoder layers, lm_head not counted."""
    attention = decoder.hidden_size * decoder.head_dim * (2 * decoder.heads + 2 * decoder.kv_heads)
    return decoder.layers * (attention + 3 * decoder.hidden_size * decoder.intermediate_size)


def weight_bytes(bits: int, block_size: int, activation_bytes: int) -> float:
    """Bytes of one weight: its bits, and its share of the block's scale and zero point."""
    if bits == 16:
        return activation_bytes
    return bits / 8 + (activation_bytes + bits / 8) / block_size


def embedding_rows(model: ModelSpec) -> int:
    """Rows of the token table: padded so that the image token has one."""
    return max(model.decoder.vocab_size, model.image_token_id + 1)


def kv_cache_bytes_per_token(decoder: DecoderSpec, target: str) -> int:
    """Bytes of the KV cache that one token of context costs."""
    return 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * ACTIVATION_BYTES[target]


def export_peak_rss_bytes(model: ModelSpec) -> int:
    """Predicted peak resident memory of the export: a base, and working copies of the largest tensor."""
    decoder = model.decoder
    largest = max(decoder.hidden_size * decoder.intermediate_size, decoder.vocab_size * decoder.hidden_size)
    return HOST_BASE_BYTES + HOST_COPIES_OF_LARGEST * largest
