"""Small ONNX models made without the ``onnx`` package, which the base install does not have.

A model is a handful of protobuf messages, written here by hand. Field numbers: onnx.proto3 of the ONNX repository;
the layout of MatMulNBits's weights: ContribOperators.md of ONNX Runtime's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

IR_VERSION, OPSET = 10, 21
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
ACCURACY_LEVEL = 4  # as an export writes its layers: products in int8
INT_ATTRIBUTE = 2  # AttributeProto.AttributeType.INT
EXTERNAL = 1  # TensorProto.DataLocation.EXTERNAL
ELEMENT_TYPES = {"float32": 1, "uint8": 2, "float16": 10}  # TensorProto.DataType


@dataclass(frozen=True)
class Node:
    """One operator: names of its inputs, its output, and its attributes, all integers."""

    operator: str
    inputs: tuple[str, ...]
    output: str
    domain: str = ""
    attributes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in ``file``, beside the model, from byte ``offset`` on."""

    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    size_bytes: int


def matmul_nbits(x: str, weight: str, y: str, shape: tuple[int, int], block: int) -> Node:
    """``y = x @ W.T`` for a 4-bit W of ``shape`` [out, in], whose tensors are named after ``weight``."""
    attributes = {"K": shape[1], "N": shape[0], "bits": 4, "block_size": block, "accuracy_level": ACCURACY_LEVEL}
    inputs = (x, f"{weight}.packed", f"{weight}.scales", f"{weight}.zero_points")
    return Node("MatMulNBits", inputs, y, MICROSOFT, attributes)


def model_bytes(
    nodes: Sequence[Node], tensors: Mapping[str, np.ndarray | StoredTensor], precision: str, widths: tuple[int, int]
) -> bytes:
    """The model from input ``x`` [rows, widths[0]] to output ``y`` [rows, widths[1]], both of dtype ``precision``."""
    graph = b"".join(_field(1, _node(node)) for node in nodes) + _field(2, "vz_edge")
    graph += b"".join(_field(5, _tensor(name, tensor)) for name, tensor in tensors.items())
    element = ELEMENT_TYPES[precision]
    graph += _field(11, _value("x", element, widths[0])) + _field(12, _value("y", element, widths[1]))
    opsets = [_field(1, "") + _field(2, OPSET), _field(1, MICROSOFT) + _field(2, 1)]
    return _field(1, IR_VERSION) + _field(7, graph) + b"".join(_field(8, opset) for opset in opsets)


def _node(node: Node) -> bytes:
    names = b"".join(_field(1, name) for name in node.inputs) + _field(2, node.output)
    message = names + _field(4, node.operator) + _field(7, node.domain)
    for name, value in node.attributes.items():
        message += _field(5, _field(1, name) + _field(3, value) + _field(20, INT_ATTRIBUTE))
    return message


def _tensor(name: str, tensor: np.ndarray | StoredTensor) -> bytes:
    dtype = tensor.dtype if isinstance(tensor, StoredTensor) else tensor.dtype.name
    message = b"".join(_field(1, size) for size in tensor.shape) + _field(2, ELEMENT_TYPES[dtype]) + _field(8, name)
    if not isinstance(tensor, StoredTensor):
        return message + _field(9, tensor.tobytes())
    place = {"location": tensor.file, "offset": tensor.offset, "length": tensor.size_bytes}
    entries = [_field(1, key) + _field(2, str(value)) for key, value in place.items()]
    return message + b"".join(_field(13, entry) for entry in entries) + _field(14, EXTERNAL)


def _value(name: str, element: int, width: int) -> bytes:
    """A ValueInfoProto of shape [rows, width]."""
    shape = _field(1, _field(2, "rows")) + _field(1, _field(1, width))
    return _field(1, name) + _field(2, _field(1, _field(1, element) + _field(2, shape)))


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protobuf message: a varint, or bytes behind their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
