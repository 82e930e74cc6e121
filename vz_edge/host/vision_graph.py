"""The vision graph: pixels in, the visual tokens that the decoder gets out.

::

    pixel_values ── tower ──┬─ hidden ───────────── select ── arrange ── projector ── image_features
    [tiles, 3, s, s]        └─ CLS query, keys ──────┘   └───────────────────────────── kept

With a budget, each tile is reduced to ``budget.per_tile`` tokens before the projector, which therefore runs on
a few tokens only. Without one (``--tokens all``) the graph gives transformers' own features: the vanilla model.

=================  ====================  =========================================================================
``pixel_values``   [tiles, 3, s, s]      float32 whatever the graph's precision; the base tile first
``grid_width``     [1] int64             tiles in a row of the grid (at least 1); only with a budget and a grid
``token_order``    [tokens] int64        indices into all tiles' patches, tile after tile, and one newline row
                                         after them; only without a budget and with a grid
``image_features`` [tokens, hidden]      in the graph's precision
``kept``           [tiles, dominant]     int64 positions in a tile, ascending, 0 = CLS; only with a budget
=================  ====================  =========================================================================

A picture gives ``tiles * budget.per_tile`` tokens; in a family with a grid, a picture of one tile (no grid) gets
the newline embedding after them.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from vz_edge.budget import TokenBudget
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.families import FAMILIES, arrange_tokens
from vz_edge.host.graph import TORCH_DTYPES, GraphBuilder
from vz_edge.host.quant import QuantConfig
from vz_edge.host.select.visionzip import cls_scores, mean_keys, select
from vz_edge.host.towers import TOWERS, TowerValues
from vz_edge.host.trace import TracedInput, inline
from vz_edge.host.weight import ALL_ROWS, Weight
from vz_edge.recipe import ModelSpec

EXAMPLE_TILES = 3  # for tracing only: base tile and a grid of two


def build_vision(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    budget: TokenBudget | None,
    precision: ir.DataType,
    quant: QuantConfig | None,
) -> GraphBuilder:
    """The vision graph of a checkpoint, its weights lazy. ``quant`` applies to the tower's and projector's linears."""
    builder = GraphBuilder("vision", precision)
    has_grid = FAMILIES[spec.family].HAS_GRID
    size, width = spec.tower.image_size, spec.decoder.hidden_size
    pixel_values = builder.input("pixel_values", ir.DataType.FLOAT, ["tiles", 3, size, size])
    pixels = pixel_values
    if precision != ir.DataType.FLOAT:
        pixels = builder.op("Cast", pixel_values, to=precision, name="pixels")
    tower = TOWERS[spec.tower.type](builder, checkpoint, spec.tower, spec.feature_layer, pixels, quant)
    if budget is not None:
        grid_width = builder.input("grid_width", ir.DataType.INT64, [1]) if has_grid else None
        tokens, kept = _reduce(builder, spec, budget, tower, grid_width)
        features = project(builder, checkpoint, spec, tokens, quant)
        if has_grid:
            features = _newline_if_one_tile(builder, checkpoint, width, features, pixel_values)
        builder.output(features, "image_features", precision, ["tokens", width])
        builder.output(kept, "kept", ir.DataType.INT64, ["tiles", budget.dominant])
        return builder
    features = project(builder, checkpoint, spec, _patches(builder, spec, tower.hidden), quant)
    if has_grid:
        token_order = builder.input("token_order", ir.DataType.INT64, ["tokens"])
        newline = _newline(builder, checkpoint, width)
        rows = builder.op("Concat", features, newline, axis=0, name="rows")
        features = builder.op("Gather", rows, token_order, axis=0, name="ordered")
    builder.output(features, "image_features", precision, ["tokens", width])
    return builder


def project(
    builder: GraphBuilder, checkpoint: Checkpoint, spec: ModelSpec, tokens: ir.Value, quant: QuantConfig | None
) -> ir.Value:
    """LLaVA's projector, linear - GELU - linear, on ``tokens`` [n, tower width]: [n, decoder width]."""
    tower_width, width = spec.tower.hidden_size, spec.decoder.hidden_size

    def linear(x: ir.Value, name: str, in_features: int) -> ir.Value:
        weight = checkpoint.weight(f"multi_modal_projector.{name}.weight", (width, in_features))
        return builder.linear(x, weight, checkpoint.weight(f"multi_modal_projector.{name}.bias", (width,)), quant)

    inner = builder.op("Gelu", linear(tokens, "linear_1", tower_width), name="multi_modal_projector.gelu")
    return linear(inner, "linear_2", width)


def _reduce(
    builder: GraphBuilder, spec: ModelSpec, budget: TokenBudget, tower: TowerValues, grid_width: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """Selection and order, traced from torch: tokens [n, tower width] and kept [tiles, dominant]."""
    dtype, width = TORCH_DTYPES[builder.precision], spec.tower.hidden_size
    tokens = 1 + spec.tower.patches
    tiles = {0: "tiles"}
    inputs = [
        TracedInput(tower.hidden, torch.randn(EXAMPLE_TILES, tokens, width, dtype=dtype), tiles),
        TracedInput(tower.query, torch.randn(EXAMPLE_TILES, width, dtype=dtype), tiles),
        TracedInput(tower.key, torch.randn(EXAMPLE_TILES, tokens, width, dtype=dtype), tiles),
    ]
    if grid_width is not None:
        inputs.append(TracedInput(grid_width, torch.tensor([EXAMPLE_TILES - 1]), {}))
    tokens_value, kept = inline(builder, reduction(spec, budget), inputs, "select")
    return tokens_value, kept


def reduction(spec: ModelSpec, budget: TokenBudget) -> Callable[..., tuple[Tensor, Tensor]]:
    """What the graph does between tower and projector, as a torch function.

    It takes hidden [tiles, 1 + p, d], CLS query [tiles, d], keys [tiles, 1 + p, d] and, in a family with a grid,
    grid_width [1] int64; it returns tokens [tiles * budget.per_tile, d] and kept [tiles, dominant].
    """
    heads = spec.tower.heads

    def reduce(hidden: Tensor, query: Tensor, key: Tensor, grid_width: Tensor | None = None) -> tuple[Tensor, Tensor]:
        selection = select(hidden, cls_scores(query, key, heads), mean_keys(key, heads), budget)
        tokens = torch.cat([selection.dominant, selection.contextual], dim=1)
        return arrange_tokens(spec, tokens, selection.kept, grid_width), selection.kept

    return reduce


def _patches(builder: GraphBuilder, spec: ModelSpec, hidden: ir.Value) -> ir.Value:
    """All tiles' patches without CLS, tile after tile, [tiles * patches, tower width]."""
    starts, ends, axes = builder.ints(1), builder.ints(1 + spec.tower.patches), builder.ints(1)
    patches = builder.op("Slice", hidden, starts, ends, axes, name="patches")
    return builder.op("Reshape", patches, builder.ints(-1, spec.tower.hidden_size), name="flat_patches")


def _newline(builder: GraphBuilder, checkpoint: Checkpoint, width: int) -> ir.Value:
    """The newline embedding as one row, [1, width]."""
    newline = checkpoint.weight("image_newline", (width,))
    return builder.weight(Weight("image_newline", (1, width), lambda rows=ALL_ROWS: newline.load()[None][rows]))


def _newline_if_one_tile(
    builder: GraphBuilder, checkpoint: Checkpoint, width: int, features: ir.Value, pixel_values: ir.Value
) -> ir.Value:
    """Append the newline row where there is one tile: it is sliced to no row at all where there are more."""
    tiles = builder.op("Shape", pixel_values, end=1, name="tiles")
    one_tile = builder.op("Cast", builder.op("Equal", tiles, builder.ints(1)), to=ir.DataType.INT64, name="one_tile")
    newline = _newline(builder, checkpoint, width)
    rows = builder.op("Slice", newline, builder.ints(0), one_tile, builder.ints(0), name="newline_rows")
    return builder.op("Concat", features, rows, axis=0, name="features_and_newline")
