"""The language model as ONNX Runtime likes it: decoder.onnx for Llama, Mistral and Qwen2.

``n`` new tokens, ``past`` tokens in the KV cache, ``total`` = past + n::

    inputs_embeds [1, n, hidden], attention_mask [1, total] int64,
    past_key_values.{i}.key/value [1, kv_heads, past, head_dim]
        -> logits [1, 1, vocab] float32, of the last position
           present.{i}.key/value [1, kv_heads, total, head_dim]

Bind one buffer of [1, kv_heads, capacity, head_dim] as a past and as its present and the cache is updated in
place: how many ones the mask has says how much of it counts, so a shorter mask rewinds it.

Every linear layer is one MatMulNBits; those that read the same input (q, k and v; gate and up) are one with the
rows of all, which changes no number and decodes a tenth faster on two threads. Attention is GroupQueryAttention
with the rotation inside; a residual sum and the norm after it are one SkipSimplifiedLayerNormalization. The last
layer keeps only the last position after its attention: nothing else of it reaches the logits.

Architecture: Llama (Touvron et al., 2023). Mistral adds a sliding window, Qwen2 biases on q, k and v.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import onnx_ir as ir
import torch

from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.decoder_spec import head_name
from vz_edge.host.graph import MICROSOFT, NUMPY_DTYPES, GraphBuilder
from vz_edge.host.head_padding import HeadPadding
from vz_edge.host.quant import QuantConfig
from vz_edge.host.rope import rotary_tables
from vz_edge.host.weight import Weight, stacked
from vz_edge.recipe import DecoderSpec

KEY_AND_VALUE = ("key", "value")


@dataclass(frozen=True)
class DecoderQuant:
    """How the decoder's linear layers and its head are quantised; None keeps the graph's precision.

    ``input_squares`` are those of ``Weight``, by its name.
    """

    linear: QuantConfig | None
    lm_head: QuantConfig | None
    input_squares: Mapping[str, torch.Tensor] = field(default_factory=dict)


def build_decoder(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    precision: ir.DataType,
    weights: DecoderQuant,
    layers: int | None = None,
) -> GraphBuilder:
    """The graph of a decoder, or of its first ``layers`` layers (a check of a model larger than memory).

    No weight is read before the graph is saved. Raises MissingTensorError, TensorShapeError, and
    UnsupportedModelError for a rotary variant that has no tables.
    """
    graph = GraphBuilder("decoder", precision)
    return _Decoder(checkpoint, spec, weights, graph, HeadPadding.of(spec)).build(layers or spec.layers)


class _Linear(NamedTuple):
    """A linear layer of the checkpoint: weight [out, in] and bias [out]."""

    weight: Weight
    bias: Weight | None


@dataclass(frozen=True)
class _Attention:
    """What GroupQueryAttention needs in every layer: lengths (int32) and rotary tables."""

    past_lengths: ir.Value
    total_length: ir.Value
    cosines: ir.Value
    sines: ir.Value


@dataclass(frozen=True)
class _Decoder:
    checkpoint: Checkpoint
    spec: DecoderSpec
    quant: DecoderQuant
    graph: GraphBuilder
    padding: HeadPadding

    def build(self, layers: int) -> GraphBuilder:
        graph, spec = self.graph, self.spec
        stream = graph.input("inputs_embeds", graph.precision, [1, "sequence", spec.hidden_size])
        mask = graph.input("attention_mask", ir.DataType.INT64, [1, "total"])
        shared = self.attention_inputs(mask)
        scale = self.weight("language_model.layers.0.input_layernorm.weight", spec.hidden_size)
        normed = graph.op("SimplifiedLayerNormalization", stream, scale, axis=-1, epsilon=spec.rms_norm_eps)
        presents: list[ir.Value] = []
        for number in range(layers):
            layer = f"language_model.layers.{number}"
            attended, *present = self.attention(normed, layer, number, shared)
            presents += present
            if number == layers - 1:
                last = graph.ints(-1)
                attended, stream = (graph.op("Gather", value, last, axis=1) for value in (attended, stream))
            update = self.linear(attended, self.output_projection(layer))
            stream, normed = self.add_and_norm(stream, update, f"{layer}.post_attention_layernorm")
            update = self.mlp(normed, layer)
            following = "norm" if number == layers - 1 else f"layers.{number + 1}.input_layernorm"
            stream, normed = self.add_and_norm(stream, update, f"language_model.{following}")
        self.logits(normed)
        for i, value in enumerate(presents):
            name = f"present.{i // 2}.{KEY_AND_VALUE[i % 2]}"
            graph.output(value, name, graph.precision, (1, spec.kv_heads, "total", self.padding.stored))
        return graph

    def attention_inputs(self, mask: ir.Value) -> _Attention:
        graph, int32 = self.graph, ir.DataType.INT32
        length = graph.op("ReduceSum", mask, graph.ints(1), keepdims=0)
        past_lengths = graph.op("Cast", graph.op("Sub", length, graph.ints(1)), to=int32, name="seqlens_k")
        shape = graph.op("Shape", mask, start=1, end=2)
        total = graph.op("Cast", graph.op("Squeeze", shape), to=int32, name="total_sequence_length")
        tables = (self.padding.table(table).astype(NUMPY_DTYPES[graph.precision]) for table in rotary_tables(self.spec))
        cosines, sines = (
            graph.constant(table, f"rotary_{name}") for table, name in zip(tables, ("cos", "sin"), strict=True)
        )
        return _Attention(past_lengths, total, cosines, sines)

    def attention(self, normed: ir.Value, layer: str, number: int, shared: _Attention) -> Sequence[ir.Value]:
        """Causal self-attention without its output projection, [1, n, heads * head_dim], and the new cache."""
        graph, spec = self.graph, self.spec
        packed = self.linear(normed, self.query_key_value(layer))
        shape = (1, spec.kv_heads, "past", self.padding.stored)
        past = [graph.input(f"past_key_values.{number}.{part}", graph.precision, shape) for part in KEY_AND_VALUE]
        return graph.multi_op(
            "GroupQueryAttention",
            packed,
            None,
            None,
            *past,
            shared.past_lengths,
            shared.total_length,
            shared.cosines,
            shared.sines,
            outputs=3,
            domain=MICROSOFT,
            name=f"{layer}.self_attn",
            num_heads=spec.heads,
            kv_num_heads=spec.kv_heads,
            do_rotary=1,
            scale=spec.head_dim**-0.5,
            local_window_size=spec.sliding_window,
        )

    def mlp(self, normed: ir.Value, layer: str) -> ir.Value:
        """``down(silu(gate(x)) * up(x))``."""
        graph, spec = self.graph, self.spec
        inner = spec.intermediate_size
        parts = [
            self.weights(f"{layer}.mlp.{part}_proj", inner, spec.hidden_size, spec.mlp_bias) for part in ("gate", "up")
        ]
        both = self.linear(normed, _side_by_side(parts))
        gate, up = graph.multi_op("Split", both, outputs=2, axis=-1, num_outputs=2)
        silu = graph.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)  # x * sigmoid(alpha * x)
        product = graph.op("Mul", silu, up)
        return self.linear(product, self.weights(f"{layer}.mlp.down_proj", spec.hidden_size, inner, spec.mlp_bias))

    def logits(self, normed: ir.Value) -> None:
        graph, spec = self.graph, self.spec
        head = self.matrix(head_name(spec), spec.vocab_size, spec.hidden_size)
        values = graph.linear(normed, head, None, self.quant.lm_head)
        if graph.precision != ir.DataType.FLOAT:
            values = graph.op("Cast", values, to=ir.DataType.FLOAT)
        graph.output(values, "logits", ir.DataType.FLOAT, [1, 1, spec.vocab_size])

    def add_and_norm(self, stream: ir.Value, update: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """The residual sum, and its RMS norm."""
        normed, _, _, total = self.graph.multi_op(
            "SkipSimplifiedLayerNormalization",
            stream,
            update,
            self.weight(f"{name}.weight", self.spec.hidden_size),
            outputs=4,
            domain=MICROSOFT,
            name=name,
            epsilon=self.spec.rms_norm_eps,
        )
        return total, normed

    def query_key_value(self, layer: str) -> _Linear:
        spec = self.spec
        parts = []
        for part, heads in (("q_proj", spec.heads), ("k_proj", spec.kv_heads), ("v_proj", spec.kv_heads)):
            name = f"{layer}.self_attn.{part}"
            weight, bias = self.weights(name, heads * spec.head_dim, spec.hidden_size, spec.qkv_bias)
            parts.append(_Linear(self.padding.rows(weight), bias and self.padding.rows(bias)))
        return _side_by_side(parts)

    def output_projection(self, layer: str) -> _Linear:
        spec = self.spec
        name = f"{layer}.self_attn.o_proj"
        weight, bias = self.weights(name, spec.hidden_size, spec.heads * spec.head_dim, spec.output_bias)
        return _Linear(self.padding.columns(weight), bias)

    def weights(self, name: str, rows: int, columns: int, bias: bool) -> _Linear:
        weight = self.matrix(f"{name}.weight", rows, columns)
        return _Linear(weight, self.checkpoint.weight(f"{name}.bias", (rows,)) if bias else None)

    def matrix(self, name: str, rows: int, columns: int) -> Weight:
        weight = self.checkpoint.weight(name, (rows, columns))
        return replace(weight, input_squares=self.quant.input_squares.get(name))

    def linear(self, x: ir.Value, linear: _Linear) -> ir.Value:
        return self.graph.linear(x, linear.weight, linear.bias, self.quant.linear)

    def weight(self, name: str, *shape: int) -> ir.Value:
        return self.graph.weight(self.checkpoint.weight(name, shape))


def _side_by_side(parts: list[_Linear]) -> _Linear:
    """Layers that read the same input as one, the first one's outputs first."""
    biases = [part.bias for part in parts if part.bias is not None]
    return _Linear(_stacked([part.weight for part in parts]), _stacked(biases) if biases else None)


def _stacked(weights: list[Weight]) -> Weight:
    """Named after all: ``self_attn.q_proj+k_proj+v_proj.weight``."""
    module, _, kind = weights[0].name.rpartition(".")
    others = [weight.name.split(".")[-2] for weight in weights[1:]]
    return stacked(f"{'+'.join([module, *others])}.{kind}", weights)
