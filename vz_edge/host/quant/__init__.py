"""Block quantisation of linear layers to 4 or 8 bits, one weight at a time, while a file is written.

Two quantisers with one contract, ``quantize(blocks, bits) -> (values, scales, zero points)``: round to nearest
(``rtn``) and half-quadratic (``hqq``). Both need the weight alone: no calibration data.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import onnx_ir as ir
import torch

from vz_edge.host.quant import hqq, rtn
from vz_edge.host.quant.pack import pack, pack_zero_points

METHODS: dict[str, ModuleType] = {"rtn": rtn, "hqq": hqq}
CHUNK_VALUES = 512 * 1024  # values quantised at a time by a thread: 2 MB of float32, which stay in the cache


@dataclass(frozen=True)
class QuantConfig:
    """How linear layers are quantised. ``accuracy_level`` 4 lets the runtime multiply in int8."""

    bits: Literal[4, 8]
    block_size: int = 128
    method: Literal["rtn", "hqq"] = "rtn"
    accuracy_level: int = 4


@dataclass(frozen=True)
class Quantized:
    """A quantised weight, packed as ``vz_edge.host.quant.pack`` tells; scales are float32."""

    packed: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor


def quantize(weight: torch.Tensor, quant: QuantConfig) -> Quantized:
    """Quantise a weight [out, in] of any float dtype."""
    rows, columns = weight.shape
    blocks = -(-columns // quant.block_size)
    packed = torch.empty((rows, blocks, quant.block_size * quant.bits // 8), dtype=torch.uint8)
    scales = torch.empty((rows, blocks))
    zero_points = torch.empty((rows, blocks), dtype=torch.uint8)
    step = max(1, CHUNK_VALUES // columns)
    padding = blocks * quant.block_size - columns

    def quantize_rows(start: int) -> None:
        chunk = slice(start, start + step)
        values = torch.nn.functional.pad(weight[chunk].to(torch.float32, copy=True), (0, padding))
        q, scales[chunk], zero_points[chunk] = METHODS[quant.method].quantize(
            values.view(-1, blocks, quant.block_size), quant.bits
        )
        packed[chunk] = pack(q, quant.bits)

    threads = torch.get_num_threads()
    # One chunk a thread: torch's own threading would synchronise after each of the short operations.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(quantize_rows, range(0, rows, step)))
    torch.set_num_threads(threads)
    return Quantized(packed, scales, pack_zero_points(zero_points, quant.bits))


def quantized_tensors(
    name: str,
    shape: tuple[int, ...],
    load: Callable[[], torch.Tensor],
    quant: QuantConfig,
    precision: ir.DataType,
) -> tuple[ir.TensorProtocol, ir.TensorProtocol, ir.TensorProtocol | None]:
    """Packed values, scales (in ``precision``) and zero points of a weight [out, in], as lazy tensors.

    The weight is read and quantised when the first of the three is written; each part is let go as soon as it
    is written itself. onnx-ir writes initializers in the order of registration, so register the three together.
    """
    out_features, in_features = shape
    blocks = -(-in_features // quant.block_size)
    scale_dtype = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}[precision]
    waiting: dict[str, torch.Tensor] = {}

    def part(key: str) -> ir.TensorProtocol:
        if key not in waiting:
            quantized = quantize(load(), quant)
            waiting.update(
                packed=quantized.packed, scales=quantized.scales.to(scale_dtype), zero_points=quantized.zero_points
            )
        return ir.tensor(waiting.pop(key).numpy(), name=f"{name}.{key}")

    def lazy(key: str, dtype: ir.DataType, *dims: int) -> ir.LazyTensor:
        return ir.LazyTensor(lambda: part(key), dtype=dtype, shape=ir.Shape(dims), name=f"{name}.{key}")

    return (
        lazy("packed", ir.DataType.UINT8, out_features, blocks, quant.block_size * quant.bits // 8),
        lazy("scales", precision, out_features, blocks),
        lazy("zero_points", ir.DataType.UINT8, out_features, -(-blocks * quant.bits // 8)),
    )
