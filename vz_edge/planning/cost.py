"""What each stage of an answer computes and moves: FLOPs and bytes from the architecture alone.

A multiply-add is two FLOPs. Attention is counted causally in the decoder (a token looks at what came before it) and
in full in the tower. Norms, activations and residual sums are counted as bytes, not as FLOPs: they are bound by
memory. Source of the counts: Kaplan et al., arXiv 2001.08361, table 1, with the attention of all heads written out.
"""

from __future__ import annotations

from dataclasses import dataclass

from vz_edge.planning.memory import decoder_linear_shapes
from vz_edge.planning.question import Question
from vz_edge.recipe import DecoderSpec, ModelSpec

# Buffers that a layer writes and reads, in units of its widths (vz_edge/host/towers/clip.py, decoder_graph.py).
HIDDEN_WIDE_BUFFERS = 8
INNER_WIDE_BUFFERS = 3


@dataclass(frozen=True)
class Work:
    """What a stage does. ``linear_flops`` are of matrix products with weights, ``attention_flops`` of those without.

    ``bytes_moved`` are weights read once, the KV cache and activations; ``unpacked_bytes`` the 16-bit size of weights
    that a runtime which cannot multiply in their own format first writes out and then reads; ``layers`` are what
    launches are counted by.
    """

    linear_flops: float
    attention_flops: float
    bytes_moved: float
    unpacked_bytes: float
    layers: int


def preprocess_pixels(model: ModelSpec, question: Question) -> int:
    """Pixels of all tiles: what resizing and normalising is proportional to."""
    return question.tiles * model.tower.image_size**2


def vision_work(
    model: ModelSpec, question: Question, weight_bytes: int, activation_bytes: int, published: bool
) -> Work:
    """Tower, selection and projector on a picture. ``published``: the code of the paper, not our graph.

    Ours leaves out the last layers, which no token comes from, and never writes the attention matrix; the published
    code runs all layers and writes, normalises and reads a matrix [heads, tokens, tokens] a layer.
    """
    tower, decoder = model.tower, model.decoder
    tokens = question.tiles * (tower.patches + 1)
    layers = tower.layers if published else tower.layers_before(model.feature_layer)
    layer_params = 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
    patch_params = 3 * tower.patch_size**2 * tower.hidden_size
    projector_params = tower.hidden_size * decoder.hidden_size + decoder.hidden_size**2
    projected = question.tiles * question.tokens_per_tile
    linear = 2 * (layers * tokens * layer_params + tokens * patch_params + projected * projector_params)
    attention = 4 * layers * tokens * (tower.patches + 1) * tower.hidden_size
    matrix = tower.heads * tokens * (tower.patches + 1)
    widths = HIDDEN_WIDE_BUFFERS * tower.hidden_size + INNER_WIDE_BUFFERS * tower.intermediate_size
    activations = 2 * layers * (tokens * widths + (2 * matrix if published else 0)) * activation_bytes
    return Work(linear, attention, weight_bytes + activations, 0, layers)


def prefill_work(
    decoder: DecoderSpec, tokens: int, weight_bytes: int, activation_bytes: int, published: bool, unpacks: bool = False
) -> Work:
    """Reading ``tokens`` tokens at once. ``published``: logits of all positions, and every layer on every token.

    Our graph goes on with the last token alone after the last layer's attention. ``unpacks``: the runtime writes the
    weights out as 16-bit numbers first.
    """
    params = decoder_params(decoder)
    head = decoder.vocab_size * decoder.hidden_size
    after_attention = decoder.hidden_size * (decoder.heads * decoder.head_dim + 3 * decoder.intermediate_size)
    saved = 0 if published else (tokens - 1) * after_attention
    linear = 2 * (tokens * params - saved + (tokens if published else 1) * head)
    attention = 2 * tokens**2 * decoder.heads * decoder.head_dim * decoder.layers
    widths = HIDDEN_WIDE_BUFFERS * decoder.hidden_size + INNER_WIDE_BUFFERS * decoder.intermediate_size
    activations = 2 * decoder.layers * tokens * widths * activation_bytes
    unpacked = 2 * params if unpacks else 0
    return Work(linear, attention, weight_bytes + activations, unpacked, decoder.layers)


def decode_work(decoder: DecoderSpec, context: float, weight_bytes: int, activation_bytes: int) -> Work:
    """Writing one token after ``context`` tokens: all weights and the whole KV cache are read."""
    linear = 2 * (decoder_params(decoder) + decoder.vocab_size * decoder.hidden_size)
    attention = 4 * context * decoder.heads * decoder.head_dim * decoder.layers
    cache = 2 * context * decoder.layers * decoder.kv_heads * decoder.head_dim * activation_bytes
    return Work(linear, attention, weight_bytes + cache, 0, decoder.layers)


def decoder_params(decoder: DecoderSpec) -> int:
    """Weights of all linear layers, lm_head not among them."""
    return sum(outputs * inputs for outputs, inputs in decoder_linear_shapes(decoder))
