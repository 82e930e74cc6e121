"""Puts a torch function into a graph under construction.

Selection and token order exist once, as torch code that torch users call too. For the vision graph that code
is traced by ``torch.onnx.export`` on small example tensors, without any weight in it, and the resulting nodes
are copied into the builder's graph.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from vz_edge.host.graph import OPSET, GraphBuilder


@dataclass(frozen=True)
class TracedInput:
    """An argument of the traced function: where it comes from in the graph, and a tensor to trace with.

    ``dynamic`` names the axes that are free at run time; equal names are equal sizes. The example's size on
    such an axis must be larger than 1, or the exporter takes it for a constant.
    """

    value: ir.Value
    example: Tensor
    dynamic: dict[int, str]


def inline(
    builder: GraphBuilder, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[TracedInput], name: str
) -> list[ir.Value]:
    """Append the nodes of ``function(*inputs)`` to the builder's graph and return its results."""
    traced = _trace(function, inputs)
    values = {theirs: ours.value for theirs, ours in zip(traced.inputs, inputs, strict=True)}
    for initializer in traced.initializers.values():
        assert initializer.const_value is not None
        values[initializer] = builder.constant(initializer.const_value.numpy(), f"{name}/{initializer.name}")
    for node in traced:
        results = builder.multi_op(
            node.op_type,
            *(None if value is None else values[value] for value in node.inputs),
            outputs=len(node.outputs),
            domain=node.domain,
            name=f"{name}/{node.op_type}",
            **node.attributes,
        )
        values |= dict(zip(node.outputs, results, strict=True))
    return [values[value] for value in traced.outputs]


def _trace(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[TracedInput]) -> ir.Graph:
    names = {axis_name for traced in inputs for axis_name in traced.dynamic.values()}
    sizes = {axis_name: torch.export.Dim(axis_name) for axis_name in names}
    shapes = [{axis: sizes[axis_name] for axis, axis_name in traced.dynamic.items()} for traced in inputs]
    with _quiet():
        program = torch.onnx.export(
            _Function(function).eval(),
            tuple(traced.example for traced in inputs),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(tuple(shapes),),
            verbose=False,
        )
    assert program is not None
    return program.model.graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter comments on things that are no concern of whoever exports a model: an absent torchvision, say."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Function(torch.nn.Module):
    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.function(*inputs)
