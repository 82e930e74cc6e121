"""CLIP's vision tower as ONNX nodes, up to the hidden states that the decoder gets to see.

Source: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020. A pre-norm
transformer over a CLS token and ``p`` patches: ``x += attention(norm(x))``, then ``x += mlp(norm(x))``.

LLaVA reads hidden state -2, the input of the last layer, so the last layer is not in the graph. Attention is
ONNX Runtime's MultiHeadAttention, which never writes the attention matrix to memory; what lies between two
blocks (bias, residual sum, norm) is one SkipLayerNormalization. VisionZip needs one row (CLS) of the attention
of one layer (the one that produced the hidden states): that layer's CLS query and keys are handed out, and no
other layer pays for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.graph import MICROSOFT, GraphBuilder
from vz_edge.host.quant import QuantConfig
from vz_edge.recipe import TowerSpec

PREFIX = "vision_tower"
QUICK_GELU_ALPHA = 1.702  # x * sigmoid(1.702 x), CLIP's approximation of GELU


class TowerValues(NamedTuple):
    """Values of the graph for ``t`` tiles of ``p`` patches, in the graph's precision.

    ``hidden`` [t, 1 + p, n * d], CLS first, the ``n`` hidden states that were asked for side by side; ``query`` [t, d],
    the CLS query, and ``key`` [t, 1 + p, d], all keys, of the layer that produced the deepest of them.
    """

    hidden: ir.Value
    query: ir.Value
    key: ir.Value


def build(
    builder: GraphBuilder,
    checkpoint: Checkpoint,
    spec: TowerSpec,
    states_read: Sequence[int],
    pixel_values: ir.Value,
    quant: QuantConfig | None,
) -> TowerValues:
    """Append the tower for ``pixel_values`` [t, 3, size, size]; ``states_read`` as in ModelSpec, not all of them 0."""
    return _Clip(builder, checkpoint, spec, quant).build(pixel_values, states_read)


@dataclass(frozen=True)
class _Clip:
    builder: GraphBuilder
    checkpoint: Checkpoint
    spec: TowerSpec
    quant: QuantConfig | None

    def build(self, pixel_values: ir.Value, states_read: Sequence[int]) -> TowerValues:
        layers = max(states_read)
        # Rows of all tiles in one matrix: ONNX Runtime then folds the biases into its matrix products.
        width, inner_width = self.spec.hidden_size, self.spec.intermediate_size
        rows = self.builder.op(
            "Reshape", self.embeddings(pixel_values), self.builder.ints(-1, width), name="tower/rows"
        )
        stream = self.layer_norm(rows, "pre_layrnorm")
        normed = self.layer_norm(stream, "encoder.layers.0.layer_norm1")
        states = [stream]  # what each layer reads
        for index in range(layers):
            layer, following = f"encoder.layers.{index}", f"encoder.layers.{index + 1}"
            query, key, value = (
                self.tiles(self.linear(normed, f"{layer}.self_attn.{part}_proj", width, width)) for part in "qkv"
            )
            attended = self.attention(query, key, value, f"{layer}.self_attn")
            update, bias = self.linear_without_bias(attended, f"{layer}.self_attn.out_proj", width, width)
            stream, normed = self.add_and_norm(stream, update, bias, f"{layer}.layer_norm2")
            inner = self.activation(
                self.linear(normed, f"{layer}.mlp.fc1", inner_width, width), f"{layer}.mlp.activation"
            )
            update, bias = self.linear_without_bias(inner, f"{layer}.mlp.fc2", width, inner_width)
            if index + 1 < layers:
                stream, normed = self.add_and_norm(stream, update, bias, f"{following}.layer_norm1")
                states.append(stream)
        biased = self.builder.op("Add", update, bias, name="tower/biased")
        states.append(self.builder.op("Add", stream, biased, name="tower/hidden"))
        asked = [self.tiles(states[index]) for index in states_read]
        hidden = asked[0] if len(asked) == 1 else self.builder.op("Concat", *asked, axis=-1, name="tower/states")
        first = self.builder.constant(np.array(0, dtype=np.int64), "tower/first")
        return TowerValues(hidden, self.builder.op("Gather", query, first, axis=1, name="tower/cls_query"), key)

    def tiles(self, rows: ir.Value) -> ir.Value:
        """Rows [t * (1 + p), d] as [t, 1 + p, d]."""
        shape = self.builder.ints(-1, 1 + self.spec.patches, self.spec.hidden_size)
        return self.builder.op("Reshape", rows, shape, name="tower/tiles")

    def embeddings(self, pixel_values: ir.Value) -> ir.Value:
        """CLS and patch embeddings with their positions, [t, 1 + p, d]."""
        op, ints, spec = self.builder.op, self.builder.ints, self.spec
        width, size = spec.hidden_size, spec.patch_size
        kernel = self.weight("embeddings.patch_embedding.weight", width, 3, size, size)
        planes = op("Conv", pixel_values, kernel, strides=[size, size], name="tower/planes")
        flat = op("Reshape", planes, ints(0, width, spec.patches), name="tower/flat")
        patches = op("Transpose", flat, perm=[0, 2, 1], name="tower/patches")
        count = op("Shape", pixel_values, end=1, name="tower/count")
        cls_shape = op("Concat", count, ints(1, 1), axis=0, name="tower/cls_shape")
        cls_rows = op("Expand", self.weight("embeddings.class_embedding", width), cls_shape, name="tower/cls_rows")
        tokens = op("Concat", cls_rows, patches, axis=1, name="tower/tokens")
        position = self.weight("embeddings.position_embedding.weight", 1 + spec.patches, width)
        return op("Add", tokens, position, name="tower/embeddings")

    def attention(self, query: ir.Value, key: ir.Value, value: ir.Value, name: str) -> ir.Value:
        attended = self.builder.op(
            "MultiHeadAttention",
            query,
            key,
            value,
            domain=MICROSOFT,
            name=f"{name}.attention",
            num_heads=self.spec.heads,
        )
        return self.builder.op("Reshape", attended, self.builder.ints(-1, self.spec.hidden_size), name=f"{name}.rows")

    def activation(self, x: ir.Value, name: str) -> ir.Value:
        if self.spec.activation == "quick_gelu":
            return self.builder.op("QuickGelu", x, domain=MICROSOFT, name=name, alpha=QUICK_GELU_ALPHA)
        return self.builder.op("Gelu", x, name=name)

    def layer_norm(self, x: ir.Value, name: str) -> ir.Value:
        scale, shift = self.norm_weights(name)
        return self.builder.op(
            "LayerNormalization", x, scale, shift, name=name, axis=-1, epsilon=self.spec.layer_norm_eps
        )

    def add_and_norm(self, stream: ir.Value, update: ir.Value, bias: ir.Value, norm: str) -> tuple[ir.Value, ir.Value]:
        """The residual stream after ``stream + update + bias``, and its layer norm."""
        normed, _, _, total = self.builder.multi_op(
            "SkipLayerNormalization",
            update,
            stream,
            *self.norm_weights(norm),
            bias,
            outputs=4,
            domain=MICROSOFT,
            name=norm,
            epsilon=self.spec.layer_norm_eps,
        )
        return total, normed

    def norm_weights(self, name: str) -> tuple[ir.Value, ir.Value]:
        width = self.spec.hidden_size
        return self.weight(f"{name}.weight", width), self.weight(f"{name}.bias", width)

    def linear(self, x: ir.Value, name: str, out_features: int, in_features: int) -> ir.Value:
        weight = self.checkpoint.weight(f"{PREFIX}.{name}.weight", (out_features, in_features))
        bias = self.checkpoint.weight(f"{PREFIX}.{name}.bias", (out_features,))
        return self.builder.linear(x, weight, bias, self.quant)

    def linear_without_bias(
        self, x: ir.Value, name: str, out_features: int, in_features: int
    ) -> tuple[ir.Value, ir.Value]:
        """The product, and the bias that the following SkipLayerNormalization adds."""
        weight = self.checkpoint.weight(f"{PREFIX}.{name}.weight", (out_features, in_features))
        return self.builder.linear(x, weight, None, self.quant), self.weight(f"{name}.bias", out_features)

    def weight(self, name: str, *shape: int) -> ir.Value:
        return self.builder.weight(self.checkpoint.weight(f"{PREFIX}.{name}", shape))
