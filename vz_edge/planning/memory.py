"""Bytes of a bundle by part, from the architecture alone: arithmetic, no model needed.

The export states these before it starts and records them; a test holds them against real bundles.
"""

from __future__ import annotations

from vz_edge.bundle import WeightSpec
from vz_edge.recipe import DecoderSpec, ModelSpec

# Python, torch and transformers, the slices of graph and tower that the parity check runs, and what a layer computes of
# the calibration's text. Measured: exports of a 1B and a 13B shape peak 0.9 and 1.1 GB above one decoder layer
# (profiles/reports/export_memory_*.md).
HOST_BASE_BYTES = 1_000_000_000
ACTIVATION_BYTES = {"cpu": 4, "cuda": 2}
NF4_BLOCK, NF4_SCALES_BLOCK = 64, 256  # NF4 with double quantisation: QLoRA (arXiv 2305.14314)


def bundle_bytes(model: ModelSpec, weights: WeightSpec, target: str) -> dict[str, int]:
    """Predicted bytes of a bundle's parts on disk: ``vision``, ``decoder``, ``lm_head``, ``embedding``.

    With bitsandbytes weights ``decoder`` has all of the checkpoint but lm_head: a token table of its own, too, so that
    transformers loads it as it is.
    """
    activation, decoder = ACTIVATION_BYTES[target], model.decoder
    embedding = embedding_rows(model) * decoder.hidden_size * 2
    vision = _vision_bytes(model, weights, activation)
    if has_bitsandbytes(weights):
        table = 2 * decoder.vocab_size * decoder.hidden_size
        norms = 2 * (2 * decoder.layers + 1) * decoder.hidden_size
        return {
            "vision": vision,
            "decoder": bitsandbytes_bytes(decoder_linear_shapes(decoder), weights.bits) + table + norms,
            "lm_head": 0 if decoder.tie_word_embeddings else table,
            "embedding": embedding,
        }
    block = weights.block_size
    small = decoder.context_length * decoder.head_dim + 2 * decoder.layers * decoder.hidden_size
    linear = linear_bytes(decoder_linear_shapes(decoder), weights.bits, block, activation)
    return {
        "vision": vision,
        "decoder": linear + small * activation,
        "lm_head": linear_bytes([(decoder.vocab_size, decoder.hidden_size)], weights.lm_head_bits, block, activation),
        "embedding": embedding,
    }


def has_bitsandbytes(weights: WeightSpec) -> bool:
    """Whether bitsandbytes made these weights, which transformers then runs."""
    return weights.quantizer in ("nf4", "int8")


def decoder_linear_shapes(decoder: DecoderSpec) -> list[tuple[int, int]]:
    """(outputs, inputs) of every linear layer of the decoder, lm_head not among them."""
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    layer = [(queries + 2 * keys, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner)]
    return decoder.layers * layer


def vision_linear_shapes(model: ModelSpec, layers: int) -> list[tuple[int, int]]:
    """(outputs, inputs) of every linear layer of the tower's first ``layers`` layers and of the projector."""
    width, inner, hidden = model.tower.hidden_size, model.tower.intermediate_size, model.decoder.hidden_size
    layer = [*4 * [(width, width)], (inner, width), (width, inner)]
    return layers * layer + [(hidden, model.feature_width), (hidden, hidden)]


def linear_bytes(shapes: list[tuple[int, int]], bits: int, block_size: int, activation_bytes: int) -> int:
    """Bytes of linear layers of (outputs, inputs): the weights, and a scale and a zero point a block.

    A row that is no multiple of the block is padded to one; zero points of a row fill whole bytes.
    """
    if bits == 16:
        return sum(outputs * inputs for outputs, inputs in shapes) * activation_bytes
    total = 0
    for outputs, inputs in shapes:
        blocks = -(-inputs // block_size)
        total += outputs * (blocks * (block_size * bits // 8 + activation_bytes) + -(-blocks * bits // 8))
    return total


def bitsandbytes_bytes(shapes: list[tuple[int, int]], bits: int) -> int:
    """The same as bitsandbytes stores them: LLM.int8(), or NF4 with double quantisation."""
    elements = sum(outputs * inputs for outputs, inputs in shapes)
    if bits == 8:
        return elements + 4 * sum(outputs for outputs, _ in shapes)
    scales = elements // NF4_BLOCK
    return elements // 2 + scales + 4 * (scales // NF4_SCALES_BLOCK)


def embedding_rows(model: ModelSpec) -> int:
    """Rows of the token table: padded so that the image token has one."""
    return max(model.decoder.vocab_size, model.image_token_id + 1)


def kv_cache_bytes_per_token(decoder: DecoderSpec, target: str) -> int:
    """Bytes of the KV cache that one token of context costs."""
    return 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * ACTIVATION_BYTES[target]


def export_peak_rss_bytes(model: ModelSpec) -> int:
    """Predicted peak resident memory of the export: a base, and one decoder layer in float32 (the parity check)."""
    shapes = decoder_linear_shapes(model.decoder)
    return HOST_BASE_BYTES + 4 * sum(outputs * inputs for outputs, inputs in shapes) // model.decoder.layers


def _vision_bytes(model: ModelSpec, weights: WeightSpec, activation_bytes: int) -> int:
    tower = model.tower
    layers, width = tower.layers_before(model.feature_layer), tower.hidden_size
    patch_and_position = 3 * tower.patch_size**2 * width + (tower.patches + 1) * width
    small = patch_and_position + layers * (9 * width + tower.intermediate_size)
    shapes = vision_linear_shapes(model, layers)
    stored = linear_bytes(shapes, weights.vision_bits, weights.block_size, activation_bytes)
    return stored + small * activation_bytes
