"""What each stage of an answer computes and moves: FLOPs and bytes from the architecture alone.

A multiply-add is two FLOPs. Attention is counted causally in the decoder (a token looks at what came before it) and
in full in the tower. Norms, activations and residual sums are counted as bytes, not as FLOPs: they are bound by
memory. Source of the counts: Kaplan et al., arXiv 2001.08361, table 1, with the attention of all heads written out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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


def vision_work(model: ModelSpec, question: Question, weight_bytes: int, activation_bytes: int) -> Work:
    """Tower, selection and projector on a picture, as our graph does it.

    It leaves out the last layers, which no token comes from, and never writes the attention matrix.
    """
    layers = model.tower.layers_before(model.feature_layer)
    return _vision_work(model, question, layers, weight_bytes, activation_bytes)


def published_vision_work(model: ModelSpec, question: Question, weight_bytes: int, activation_bytes: int) -> Work:
    """The same as the code of the paper does it: all layers, and in each a matrix [heads, tokens, tokens] of a tile.

    That matrix is written, normalised and read.
    """
    tower = model.tower
    work = _vision_work(model, question, tower.layers, weight_bytes, activation_bytes)
    matrices = tower.layers * question.tiles * tower.heads * (tower.patches + 1) ** 2
    return replace(work, bytes_moved=work.bytes_moved + 4 * matrices * activation_bytes)


def _vision_work(model: ModelSpec, question: Question, layers: int, weight_bytes: int, activation_bytes: int) -> Work:
    tower, decoder = model.tower, model.decoder
    tokens = question.tiles * (tower.patches + 1)
    layer_params = 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
    patch_params = 3 * tower.patch_size**2 * tower.hidden_size
    projector_params = model.feature_width * decoder.hidden_size + decoder.hidden_size**2
    projected = question.tiles * question.tokens_per_tile
    linear = 2 * (layers * tokens * layer_params + tokens * patch_params + projected * projector_params)
    attention = 4 * layers * tokens * (tower.patches + 1) * tower.hidden_size
    widths = HIDDEN_WIDE_BUFFERS * tower.hidden_size + INNER_WIDE_BUFFERS * tower.intermediate_size
    activations = 2 * layers * tokens * widths * activation_bytes
    return Work(linear, attention, weight_bytes + activations, 0, layers)


def prefill_work(decoder: DecoderSpec, tokens: int, weight_bytes: int, activation_bytes: int) -> Work:
    """Reading ``tokens`` tokens at once, as our graph does it.

    After the last layer's attention the last token goes on alone, and logits are of that one.
    """
    after_attention = decoder.hidden_size * (decoder.heads * decoder.head_dim + 3 * decoder.intermediate_size)
    head = decoder.vocab_size * decoder.hidden_size
    work = published_prefill_work(decoder, tokens, weight_bytes, activation_bytes)
    return replace(work, linear_flops=work.linear_flops - 2 * (tokens - 1) * (after_attention + head))


def published_prefill_work(decoder: DecoderSpec, tokens: int, weight_bytes: int, activation_bytes: int) -> Work:
    """The same as the code of the paper does it: every layer on every token, and logits of all positions."""
    linear = 2 * tokens * (decoder_params(decoder) + decoder.vocab_size * decoder.hidden_size)
    attention = 2 * tokens**2 * decoder.heads * decoder.head_dim * decoder.layers
    widths = HIDDEN_WIDE_BUFFERS * decoder.hidden_size + INNER_WIDE_BUFFERS * decoder.intermediate_size
    activations = 2 * decoder.layers * tokens * widths * activation_bytes
    return Work(linear, attention, weight_bytes + activations, 0, decoder.layers)


def unpacking_work(work: Work, decoder: DecoderSpec) -> Work:
    """A prefill's ``work`` by a runtime that first writes the decoder's weights out as 16-bit numbers."""
    return replace(work, unpacked_bytes=2 * decoder_params(decoder))


def decode_work(decoder: DecoderSpec, context: float, weight_bytes: int, activation_bytes: int) -> Work:
    """Writing one token after ``context`` tokens: all weights and the whole KV cache are read."""
    linear = 2 * (decoder_params(decoder) + decoder.vocab_size * decoder.hidden_size)
    attention = 4 * context * decoder.heads * decoder.head_dim * decoder.layers
    cache = 2 * context * decoder.layers * decoder.kv_heads * decoder.head_dim * activation_bytes
    return Work(linear, attention, weight_bytes + cache, 0, decoder.layers)


def decoder_params(decoder: DecoderSpec) -> int:
    """Weights of all linear layers, lm_head not among them."""
    return sum(outputs * inputs for outputs, inputs in decoder_linear_shapes(decoder))
