"""Linear layers as bitsandbytes stores them, quantised by its own functions some rows at a time.

A block of NF4 (64 values that follow each other in a row) and a row of LLM.int8() depend on nothing else, so the
result is bit by bit that of quantising the whole layer on the CPU, at a tenth of the memory. What depends on all of
a layer, the second quantisation of NF4's scales, is done at the end on all of them.
"""

from __future__ import annotations

import torch
from bitsandbytes import functional  # type: ignore[import-not-found, unused-ignore]

from vz_edge.backends.language_model_files import NF4_BLOCK, SCALES_BLOCK
from vz_edge.host.quant.chunks import CHUNK_VALUES, in_threads
from vz_edge.host.weight import Weight


def nf4_tensors(weight: Weight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """``weight`` [out, in] as the state dict of a Linear4bit: NF4 with double quantisation (QLoRA, arXiv 2305.14314).

    ``dtype`` is what the layer will dequantise to. ``in`` must be a multiple of 64.
    """
    rows, columns = weight.shape
    packed = torch.empty((rows * columns // 2, 1), dtype=torch.uint8)
    scales = torch.empty(rows * columns // NF4_BLOCK)
    step = max(1, CHUNK_VALUES // columns)

    def quantize_rows(start: int) -> None:
        first, last = start * columns, min(start + step, rows) * columns
        values = weight.load(slice(start, start + step))
        chunk, state = functional.quantize_4bit(values, blocksize=NF4_BLOCK, quant_type="nf4")
        packed[first // 2 : last // 2] = chunk
        scales[first // NF4_BLOCK : last // NF4_BLOCK] = state.absmax

    in_threads(quantize_rows, range(0, rows, step))
    mean = scales.mean()
    quantized_scales, scales_state = functional.quantize_blockwise(scales - mean, blocksize=SCALES_BLOCK)
    state = functional.QuantState(
        absmax=quantized_scales,
        shape=torch.Size(weight.shape),
        dtype=dtype,
        blocksize=NF4_BLOCK,
        code=functional.get_4bit_type("nf4", device="cpu"),
        quant_type="nf4",
        offset=mean,
        state2=scales_state,
    )
    return {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}


def int8_tensors(weight: Weight) -> dict[str, torch.Tensor]:
    """``weight`` [out, in] as the state dict of a Linear8bitLt: LLM.int8() (arXiv 2208.07339), from fp16."""
    rows, columns = weight.shape
    quantized = torch.empty((rows, columns), dtype=torch.int8)
    scales = torch.empty(rows)
    step = max(1, CHUNK_VALUES // columns)

    def quantize_rows(start: int) -> None:
        chunk = slice(start, min(start + step, rows))
        quantized[chunk], scales[chunk], _ = functional.int8_vectorwise_quant(weight.load(chunk).to(torch.float16))

    in_threads(quantize_rows, range(0, rows, step))
    return {"weight": quantized, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
