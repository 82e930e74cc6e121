"""Block quantisation of linear layers to 4 or 8 bits, one weight at a time, while a file is written.

Quantisers give values, scales and zero points of blocks: round to nearest (``rtn``) and half-quadratic (``hqq``) from
the weight alone, ``weighted`` with regard to what the layer is multiplied with, where that is known (else ``rtn``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import onnx_ir as ir
import torch

from vz_edge.bundle import WeightSpec
from vz_edge.host.quant import hqq, rtn, weighted
from vz_edge.host.quant.chunks import CHUNK_VALUES, in_threads
from vz_edge.host.quant.pack import pack, pack_zero_points
from vz_edge.host.weight import Weight

BlockGrids = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # values and, for each block, scale and zero point


@dataclass(frozen=True)
class QuantConfig:
    """How linear layers are quantised. ``accuracy_level`` 4 lets the runtime multiply in int8."""

    bits: Literal[4, 8]
    block_size: int = 128
    method: Literal["rtn", "hqq", "weighted"] = "rtn"
    accuracy_level: int = 4


def quant_config(bits: Literal[4, 8, 16], weights: WeightSpec) -> QuantConfig | None:
    """How a bundle with these ``weights`` quantises its graphs' layers of so many bits; None for 16."""
    return None if bits == 16 else QuantConfig(bits, weights.block_size, weights.quantizer)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Quantized:
    """A quantised weight, packed as ``vz_edge.host.quant.pack`` tells; scales are float32."""

    packed: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor


def quantize(weight: Weight, quant: QuantConfig) -> Quantized:
    """Read and quantise a weight [out, in], some rows at a time."""
    rows, columns = weight.shape
    blocks = -(-columns // quant.block_size)
    packed = torch.empty((rows, blocks, quant.block_size * quant.bits // 8), dtype=torch.uint8)
    scales = torch.empty((rows, blocks))
    zero_points = torch.empty((rows, -(-blocks * quant.bits // 8)), dtype=torch.uint8)
    step = max(1, CHUNK_VALUES // columns)
    quantize_blocks = _quantizer(weight, quant)

    def quantize_rows(start: int) -> None:
        chunk = slice(start, min(start + step, rows))
        q, scales[chunk], zeros = quantize_blocks(_in_blocks(weight.load(chunk), quant.block_size))
        packed[chunk] = pack(q, quant.bits)
        zero_points[chunk] = pack_zero_points(zeros, quant.bits)

    in_threads(quantize_rows, range(0, rows, step))
    return Quantized(packed, scales, zero_points)


def _quantizer(weight: Weight, quant: QuantConfig) -> Callable[[torch.Tensor], BlockGrids]:
    """What quantises blocks [rows, blocks, block_size] of this weight, which are overwritten."""
    if quant.method == "hqq":
        return partial(hqq.quantize, bits=quant.bits)
    if quant.method == "weighted" and weight.input_squares is not None:
        importance = _in_blocks(weight.input_squares[None], quant.block_size)
        return partial(weighted.quantize, bits=quant.bits, importance=importance)
    return partial(rtn.quantize, bits=quant.bits)


def _in_blocks(values: torch.Tensor, block_size: int) -> torch.Tensor:
    """A float32 copy of ``values`` [rows, columns] as [rows, blocks, block_size], the last block padded with zeros."""
    rows, columns = values.shape
    blocks = -(-columns // block_size)
    padded = torch.zeros((rows, blocks * block_size))
    padded[:, :columns] = values
    return padded.view(rows, blocks, block_size)


def quantized_tensors(
    weight: Weight, quant: QuantConfig, precision: ir.DataType
) -> tuple[ir.TensorProtocol, ir.TensorProtocol, ir.TensorProtocol]:
    """Packed values, scales (in ``precision``) and zero points of a weight [out, in], as lazy tensors.

    The weight is read and quantised when the first of the three is written; each part is let go as soon as it
    is written itself. onnx-ir writes initializers in the order of registration, so register the three together.
    """
    out_features, in_features = weight.shape
    blocks = -(-in_features // quant.block_size)
    scale_dtype = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}[precision]
    waiting: dict[str, torch.Tensor] = {}

    def take(part: str) -> ir.TensorProtocol:
        if part not in waiting:
            quantized = quantize(weight, quant)
            waiting.update(
                packed=quantized.packed, scales=quantized.scales.to(scale_dtype), zero_points=quantized.zero_points
            )
        return ir.tensor(waiting.pop(part).numpy(), name=f"{weight.name}.{part}")

    def lazy(part: str, dtype: ir.DataType, *shape: int) -> ir.LazyTensor:
        return ir.LazyTensor(lambda: take(part), dtype=dtype, shape=ir.Shape(shape), name=f"{weight.name}.{part}")

    return (
        lazy("packed", ir.DataType.UINT8, out_features, blocks, quant.block_size * quant.bits // 8),
        lazy("scales", precision, out_features, blocks),
        lazy("zero_points", ir.DataType.UINT8, out_features, -(-blocks * quant.bits // 8)),
    )
