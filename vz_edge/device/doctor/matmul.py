"""A tiny ONNX model of one 4-bit MatMulNBits, and what it must give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vz_edge.device.onnx_model import matmul_nbits, model_bytes

if TYPE_CHECKING:
    import numpy as np

INPUTS, OUTPUTS, BLOCK = 512, 48, 128  # blocks as an export writes them, with zero points


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
    tensors = {"w.packed": _pack(values), "w.scales": scales, "w.zero_points": _pack(zero_points)}
    node = matmul_nbits("x", "w", "y", (OUTPUTS, INPUTS), BLOCK)
    model = model_bytes([node], tensors, precision, (INPUTS, OUTPUTS))
    return MatMul(model, x, x.astype(np.float64) @ weight.T)


def _pack(values: np.ndarray) -> np.ndarray:
    """Two 4-bit values a byte along the last axis, the even one in the low half."""
    packed: np.ndarray = values[..., 0::2] | (values[..., 1::2] << 4)
    return packed
