"""The vision graph: pixels in, the visual tokens that the decoder gets out.

::

    pixel_values ── tower ──┬─ hidden ───────────── select ── arrange ── projector ── image_features
    [tiles, 3, s, s]        └─ CLS query, keys ──────┘   └───────────────────── kept, scores, merged

Of several budgets each has a small graph of its own between tower and projector, of which the one asked for runs.
With a budget, each tile is reduced to ``budget.per_tile`` tokens before the projector, which therefore runs on
a few tokens only. Without one (``--tokens all``) the graph gives transformers' own features: the vanilla model.

=================  ====================  =========================================================================
``pixel_values``   [tiles, 3, s, s]      float32 whatever the graph's precision; the base tile first
``grid_width``     [1] int64             tiles in a row of the grid (at least 1); only with a budget and a grid
``token_order``    [tokens] int64        indices into all tiles' patches, tile after tile, and one newline row
                                         after them; only without a budget and with a grid
``image_features`` [tokens, hidden]      in the graph's precision
``budget``         [1] int64             which of several budgets, 0 (the first) where it is not fed; only with several
``kept``           [tiles, dominant]     int64 positions in a tile, ascending, 0 = CLS; only with a budget
``scores``         [tiles, p]            float32 attention of CLS to each patch, summed over heads; only with a budget
``merged``         [tiles, 1 + p]        int64 contextual token of each position, -1 = kept; only with a budget
=================  ====================  =========================================================================

A picture gives ``tiles * budget.per_tile`` tokens; in a family with a grid, a picture of one tile (no grid) gets
the newline embedding after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
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
    budgets: Sequence[TokenBudget],
    precision: ir.DataType,
    quant: QuantConfig | None,
) -> GraphBuilder:
    """The vision graph of a checkpoint, its weights lazy; without ``budgets`` it gives all tokens.

    ``quant`` applies to the tower's and projector's linears.
    """
    builder = GraphBuilder("vision", precision)
    has_grid = FAMILIES[spec.family].HAS_GRID
    size, width = spec.tower.image_size, spec.decoder.hidden_size
    pixel_values = builder.input("pixel_values", ir.DataType.FLOAT, ["tiles", 3, size, size])
    pixels = pixel_values
    if precision != ir.DataType.FLOAT:
        pixels = builder.op("Cast", pixel_values, to=precision, name="pixels")
    tower = TOWERS[spec.tower.type](builder, checkpoint, spec.tower, spec.states_read, pixels, quant)
    if budgets:
        grid_width = builder.input("grid_width", ir.DataType.INT64, [1]) if has_grid else None
        tokens, kept, scores, merged = _reduce(builder, spec, budgets, tower, grid_width)
        features = project(builder, checkpoint, spec, tokens, quant)
        if has_grid:
            features = _newline_if_one_tile(builder, checkpoint, width, features, pixel_values)
        builder.output(features, "image_features", precision, ["tokens", width])
        dominant, patches = budgets[0].dominant if len(budgets) == 1 else "dominant", spec.tower.patches
        builder.output(kept, "kept", ir.DataType.INT64, ["tiles", dominant])
        builder.output(scores, "scores", ir.DataType.FLOAT, ["tiles", patches])
        builder.output(merged, "merged", ir.DataType.INT64, ["tiles", 1 + patches])
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
    """LLaVA's projector, linear - GELU - linear, on ``tokens`` [n, feature width]: [n, decoder width]."""
    width = spec.decoder.hidden_size

    def linear(x: ir.Value, name: str, in_features: int) -> ir.Value:
        weight = checkpoint.weight(f"multi_modal_projector.{name}.weight", (width, in_features))
        bias = checkpoint.weight(f"multi_modal_projector.{name}.bias", (width,)) if spec.projector_bias else None
        return builder.linear(x, weight, bias, quant)

    inner = builder.op("Gelu", linear(tokens, "linear_1", spec.feature_width), name="multi_modal_projector.gelu")
    return linear(inner, "linear_2", width)


def _reduce(
    builder: GraphBuilder,
    spec: ModelSpec,
    budgets: Sequence[TokenBudget],
    tower: TowerValues,
    grid_width: ir.Value | None,
) -> Sequence[ir.Value]:
    """Selection and order, traced from torch: what ``reduction`` returns."""
    dtype, width = TORCH_DTYPES[builder.precision], spec.tower.hidden_size
    tokens = 1 + spec.tower.patches
    tiles = {0: "tiles"}
    inputs = [
        TracedInput(tower.hidden, torch.randn(EXAMPLE_TILES, tokens, spec.feature_width, dtype=dtype), tiles),
        TracedInput(tower.query, torch.randn(EXAMPLE_TILES, width, dtype=dtype), tiles),
        TracedInput(tower.key, torch.randn(EXAMPLE_TILES, tokens, width, dtype=dtype), tiles),
    ]
    if grid_width is not None:
        inputs.append(TracedInput(grid_width, torch.tensor([EXAMPLE_TILES - 1]), {}))
    if len(budgets) == 1:
        return inline(builder, reduction(spec, budgets[0]), inputs, "select")
    chosen = builder.optional_input("budget", np.array([0]))
    branches = [
        partial(inline, builder, reduction(spec, budget), inputs, f"select_{budget.per_tile}") for budget in budgets
    ]
    return builder.choose(chosen, branches, "budget")


def reduction(spec: ModelSpec, budget: TokenBudget) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What the graph does between tower and projector, as a torch function.

    It takes hidden [tiles, 1 + p, n * d] (n feature layers), CLS query [tiles, d], keys [tiles, 1 + p, d] and, in a
    family with a grid, grid_width [1] int64; it returns tokens [tiles * budget.per_tile, n * d] and, for whoever wants
    to see why, kept [tiles, dominant], scores [tiles, p] and merged [tiles, 1 + p].
    """
    heads = spec.tower.heads

    def reduce(
        hidden: Tensor, query: Tensor, key: Tensor, grid_width: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores = cls_scores(query, key, heads)
        selection = select(hidden, scores, mean_keys(key, heads), budget)
        tokens = torch.cat([selection.dominant, selection.contextual], dim=1)
        return arrange_tokens(spec, tokens, selection.kept, grid_width), selection.kept, scores, selection.merged

    return reduce


def _patches(builder: GraphBuilder, spec: ModelSpec, hidden: ir.Value) -> ir.Value:
    """All tiles' patches, CLS before them where it is a token, tile after tile, [tokens, feature width]."""
    patches = hidden
    if not spec.cls_is_token:
        starts, ends, axes = builder.ints(1), builder.ints(1 + spec.tower.patches), builder.ints(1)
        patches = builder.op("Slice", hidden, starts, ends, axes, name="patches")
    return builder.op("Reshape", patches, builder.ints(-1, spec.feature_width), name="flat_patches")


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
