"""A thin builder over onnx-ir: operators, lazy weights and (quantised) linear layers.

Every weight enters a graph as an ``onnx_ir.LazyTensor``: shape and dtype are known at once, the numbers are
read, converted and quantised one tensor at a time while the file is written. Memory is bounded by the
largest tensor, not by the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from vz_edge.host.quant import QuantConfig, quantized_tensors
from vz_edge.host.weight import Weight

OPSET = 20
MICROSOFT = "com.microsoft"
TRANSPOSED_ROWS = 128
EMBEDDED_BYTES = 256  # tensors up to this size are stored in the .onnx file itself
NUMPY_DTYPES: dict[ir.DataType, np.dtype[Any]] = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
}
TORCH_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}


class GraphBuilder:
    """Builds one ONNX graph whose activations have the dtype ``precision`` (FLOAT or FLOAT16)."""

    def __init__(self, name: str, precision: ir.DataType) -> None:
        self.precision = precision
        self.graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": OPSET, MICROSOFT: 1})
        self._nodes = self.graph  # where nodes are appended: the graph itself, or a branch of it
        self._names: dict[str, int] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """A graph input; a string in ``shape`` is a symbolic dimension."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def optional_input(self, name: str, default: np.ndarray) -> ir.Value:
        """A graph input that has a value where it is not fed: an initializer that is an input, too (ONNX IR 4)."""
        value = self._initializer(ir.tensor(default, name=name))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make ``value`` the graph's output ``name``."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.graph.outputs.append(value)

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", name: str = "", **attributes: Any
    ) -> ir.Value:
        """Append a node with one output and return that output."""
        return self.multi_op(op_type, *inputs, outputs=1, domain=domain, name=name, **attributes)[0]

    def multi_op(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", name: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs. ``name`` (made unique) also names the outputs."""
        unique = self._unique(name or op_type)
        values = [ir.Value(name=f"{unique}/output_{i}") for i in range(outputs)]
        converted = {key: value for key, value in attributes.items() if value is not None}
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in converted.items()]
        node = ir.Node(domain, op_type, inputs, attributes=attrs, outputs=values, name=unique)
        self._nodes.append(node)
        return values

    def choose(
        self, index: ir.Value, branches: Sequence[Callable[[], Sequence[ir.Value]]], name: str
    ) -> Sequence[ir.Value]:
        """The values of the branch of number ``index`` [1] int64; the others do not run.

        Each branch appends its nodes and returns its values, which may come from outside it only by way of a node.
        """
        return self._choose(index, 0, branches, name)

    def _choose(
        self, index: ir.Value, number: int, branches: Sequence[Callable[[], Sequence[ir.Value]]], name: str
    ) -> Sequence[ir.Value]:
        this, *others = branches
        if not others:
            return this()
        is_this = self.op("Equal", index, self.ints(number), name=f"{name}/is_{number}")
        then_branch = self._branch(this, f"{name}/{number}")
        else_branch = self._branch(lambda: self._choose(index, number + 1, others, name), f"{name}/after_{number}")
        outputs = len(then_branch.outputs)
        return self.multi_op(
            "If", is_this, outputs=outputs, name=f"{name}/if_{number}", then_branch=then_branch, else_branch=else_branch
        )

    def _branch(self, build: Callable[[], Sequence[ir.Value]], name: str) -> ir.Graph:
        """A graph of the nodes that ``build`` appends; weights and constants stay with the whole graph."""
        around = self._nodes
        self._nodes = branch = ir.Graph([], [], nodes=[], name=name)
        try:
            branch.outputs.extend(build())
        finally:
            self._nodes = around
        return branch

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """A small array as an initializer, stored in its own dtype."""
        return self._initializer(ir.tensor(np.asarray(array, order="C"), name=self._unique(name)))

    def stored_in(self, file: str, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        """An initializer that is all of ``file``, a file beside the graph."""
        length = math.prod(shape) * int(dtype.itemsize)
        return self._initializer(ir.ExternalTensor(file, 0, length, dtype, shape=ir.Shape(shape), name=name))

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant."""
        return self.constant(np.array(values, dtype=np.int64), "ints_" + "_".join(map(str, values)))

    def weight(self, weight: Weight) -> ir.Value:
        """A weight of the checkpoint in the graph's precision, evaluated when the file is written."""
        dtype = TORCH_DTYPES[self.precision]
        return self._lazy(weight.name, weight.shape, lambda: weight.load().to(dtype))

    def linear(self, x: ir.Value, weight: Weight, bias: Weight | None, quant: QuantConfig | None) -> ir.Value:
        """``x @ weight.T + bias`` for a weight of shape [out, in]: MatMulNBits if ``quant``, else MatMul."""
        name = weight.name.removesuffix(".weight")
        if quant is None:
            dtype = TORCH_DTYPES[self.precision]
            matrix = self._lazy(f"{name}.transposed", weight.shape[::-1], lambda: _transposed(weight, dtype))
            y = self.op("MatMul", x, matrix, name=name)
            return y if bias is None else self.op("Add", y, self.weight(bias), name=f"{name}.add_bias")
        out_features, in_features = weight.shape
        tensors = quantized_tensors(weight, quant, self.precision)
        initializers = [self._initializer(tensor) for tensor in tensors]
        bias_inputs = [] if bias is None else [None, self.weight(bias)]  # g_idx, bias
        return self.op(
            "MatMulNBits",
            x,
            *initializers,
            *bias_inputs,
            domain=MICROSOFT,
            name=name,
            K=in_features,
            N=out_features,
            bits=quant.bits,
            block_size=quant.block_size,
            accuracy_level=quant.accuracy_level,
        )

    def save(self, path: Path, progress: Callable[[str, int], None]) -> None:
        """Write ``path`` and, beside it, ``path.data``, calling ``progress(tensor name, bytes)`` for each tensor."""
        ir.save(
            self.model(),
            path,
            external_data=f"{path.name}.data",
            size_threshold_bytes=EMBEDDED_BYTES,
            callback=lambda tensor, _: progress(tensor.name or "", tensor.nbytes),
        )

    def model(self) -> ir.Model:
        """The graph as a model; its weights are evaluated when they are asked for."""
        return ir.Model(self.graph, ir_version=10, producer_name="vz-edge")

    def weight_bytes(self) -> int:
        """Bytes that ``save`` reports to ``progress`` in all."""
        sizes = (
            value.const_value.nbytes for value in self.graph.initializers.values() if value.const_value is not None
        )
        return sum(size for size in sizes if size > EMBEDDED_BYTES)

    def _lazy(self, name: str, shape: tuple[int, ...], load: Callable[[], torch.Tensor]) -> ir.Value:
        """An initializer in the graph's precision that is evaluated when the file is written."""

        def evaluate() -> ir.TensorProtocol:
            return ir.tensor(load().contiguous().numpy(), name=name)

        return self._initializer(ir.LazyTensor(evaluate, dtype=self.precision, shape=ir.Shape(shape), name=name))

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        assert tensor.name is not None
        if tensor.name in self.graph.initializers:
            return self.graph.initializers[tensor.name]
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        # "." and not "_": the second ints(1) must not get the name of ints(1, 1).
        return name if count == 0 else f"{name}.{count}"


def _transposed(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight as [in, out], some rows at a time: several times faster than at once, and with no second copy."""
    rows, columns = weight.shape
    matrix = torch.empty((columns, rows), dtype=dtype)
    for start in range(0, rows, TRANSPOSED_ROWS):
        chunk = slice(start, min(start + TRANSPOSED_ROWS, rows))
        matrix[:, chunk] = weight.load(chunk).to(dtype).T.contiguous()
    return matrix
