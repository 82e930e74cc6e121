"""Run a written ONNX file in pieces, so that no more than a slice of its weights is in memory at a time.

The nodes are walked in order and cut wherever the weights of a piece would grow too large; what a later
piece needs of an earlier one is passed on as arrays. The numbers are those of the whole file, whose bytes
are read from where the export wrote them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

SEGMENT_BYTES = 150_000_000


def run_in_segments(path: Path, feeds: dict[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
    """Values ``outputs`` of the graph in ``path`` for ``feeds``; a piece has at most SEGMENT_BYTES or one node.

    ``outputs`` may name any value of the graph; nodes after the last of them are not run.
    """
    graph = ir.load(path).graph
    nodes = list(graph)
    last_use = _last_uses(nodes, outputs)
    stop = max(index for index, node in enumerate(nodes) if any(value.name in outputs for value in node.outputs)) + 1
    arrays = dict(feeds)
    for start, end in _pieces(nodes[:stop]):
        needed = [
            value.name
            for node in nodes[start:end]
            for value in node.outputs
            if value.name and (last_use.get(value.name, -1) >= end or value.name in outputs)
        ]
        arrays.update(_run_piece(path, graph, nodes[start:end], arrays, needed))
        arrays = {name: array for name, array in arrays.items() if name in outputs or last_use.get(name, -1) >= end}
    return [arrays[name] for name in outputs]


def _last_uses(nodes: list[ir.Node], outputs: Sequence[str]) -> dict[str, int]:
    uses = {}
    for index, node in enumerate(nodes):
        uses.update({value.name: index for value in _read(node) if value.name})
    return uses


def _read(node: ir.Node) -> Iterable[ir.Value]:
    """Values from outside that a node takes, those that only its branches take included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            branch = attribute.as_graph()
            yield from (value for inner in branch for value in _read(inner) if value.graph is not branch)


def _pieces(nodes: list[ir.Node]) -> Iterator[tuple[int, int]]:
    start = size_bytes = 0
    for index, node in enumerate(nodes):
        weights = sum(value.const_value.nbytes for value in _read(node) if value.const_value is not None)
        if size_bytes and size_bytes + weights > SEGMENT_BYTES:
            yield start, index
            start = index
            size_bytes = 0
        size_bytes += weights
    yield start, len(nodes)


def _run_piece(
    path: Path, graph: ir.Graph, nodes: list[ir.Node], arrays: dict[str, np.ndarray], needed: list[str]
) -> dict[str, np.ndarray]:
    import onnxruntime as ort

    values = {value.name: value for node in nodes for value in (*_read(node), *node.outputs)}
    produced = {value.name for node in nodes for value in node.outputs}
    fed = [name for name in values if name in arrays and name not in produced]
    for name in fed:
        array = arrays[name]
        values[name].type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        values[name].shape = ir.Shape(array.shape)
    piece = ir.convenience.extract(graph, fed, needed)
    file = path.with_name(f".{path.name}.segment")
    try:
        ir.save(ir.Model(piece, ir_version=10), file)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return dict(zip(needed, session.run(needed, {name: arrays[name] for name in fed}), strict=True))
    finally:
        file.unlink(missing_ok=True)
