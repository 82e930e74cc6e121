"""A tiny ONNX model of one 4-bit MatMulNBits, and what it must give.

The base install has no ``onnx`` package, so the few protobuf messages are written by hand. Field numbers: onnx.proto3
of the ONNX repository. The weight's layout: MatMulNBits in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# As an export writes its layers: blocks of 128 with zero points, and accuracy level 4 (products in int8).
INPUTS, OUTPUTS, BLOCK, ACCURACY_LEVEL = 512, 48, 128, 4
IR_VERSION, OPSET = 10, 21
INT_ATTRIBUTE = 2  # AttributeProto.AttributeType.INT
ELEMENT_TYPES = {"float32": 1, "uint8": 2, "float16": 10}  # TensorProto.DataType


@dataclass(frozen=True)
class MatMul:
    """``model``: ONNX bytes; maps input ``x`` [rows, INPUTS] to output ``y``, ``expected`` [rows, OUTPUTS]."""

    model: bytes
    x: np.ndarray
    expected: np.ndarray


def make_matmul(precision: str) -> MatMul:
    """The model and its answer for activations in ``precision`` (float32 or float16); five rows, float64 answer."""
    import numpy as np

    rng = np.random.default_rng(0)
    blocks = INPUTS // BLOCK
    values = rng.integers(0, 16, (OUTPUTS, blocks, BLOCK), dtype=np.uint8)
    zero_points = rng.integers(5, 11, (OUTPUTS, blocks), dtype=np.uint8)
    scales = rng.uniform(0.005, 0.02, (OUTPUTS, blocks)).astype(precision)
    x = rng.standard_normal((5, INPUTS)).astype(precision)
    shifted = values.astype(np.float64) - zero_points[:, :, np.newaxis]
    weight = (shifted * scales[:, :, np.newaxis].astype(np.float64)).reshape(OUTPUTS, INPUTS)
    return MatMul(_model(_pack(values), scales, _pack(zero_points)), x, x.astype(np.float64) @ weight.T)


def _pack(values: np.ndarray) -> np.ndarray:
    """Two 4-bit values a byte along the last axis, the even one in the low half."""
    packed: np.ndarray = values[..., 0::2] | (values[..., 1::2] << 4)
    return packed


def _model(packed: np.ndarray, scales: np.ndarray, zero_points: np.ndarray) -> bytes:
    element = ELEMENT_TYPES[scales.dtype.name]
    attributes = {"K": INPUTS, "N": OUTPUTS, "bits": 4, "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
    node = b"".join(_field(1, name) for name in ("x", "packed", "scales", "zero_points"))
    node += _field(2, "y") + _field(4, "MatMulNBits") + _field(7, "com.microsoft")
    for name, value in attributes.items():
        node += _field(5, _field(1, name) + _field(3, value) + _field(20, INT_ATTRIBUTE))
    graph = _field(1, node) + _field(2, "doctor")
    for name, array in {"packed": packed, "scales": scales, "zero_points": zero_points}.items():
        dims = b"".join(_field(1, size) for size in array.shape)
        data_type = _field(2, ELEMENT_TYPES[array.dtype.name])
        graph += _field(5, dims + data_type + _field(8, name) + _field(9, array.tobytes()))
    graph += _field(11, _value("x", element, INPUTS)) + _field(12, _value("y", element, OUTPUTS))
    opsets = [_field(1, "") + _field(2, OPSET), _field(1, "com.microsoft") + _field(2, 1)]
    return _field(1, IR_VERSION) + _field(7, graph) + b"".join(_field(8, opset) for opset in opsets)


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
