"""Round to nearest on grids that change what a layer gives least, for what it is multiplied with.

A weight's squared error counts by the mean square of its input: the expected square of the change of the layer's
outputs, were its inputs uncorrelated. llama.cpp's importance matrix weighs so, too.

Each block tries its range (``rtn``) and parts of it, which clip the outliers and round all others finer. Rounded to
whole numbers ``c`` from the zero point, a block is best served by the scale ``s`` of least squares, and its error is
then smaller by ``A * A / B`` than that of zeros::

    A = sum(importance * w * c),  B = sum(importance * c * c),  s = A / B

The part with the largest gain is taken. Rounding to ``s`` once more can only lower the error, so that no block is worse
than round to nearest. Zero points stay those of the range: fitted too, they lower the blocks' errors further and yet
raise the perplexity (measured on the model of profiles/reports/weights_quality.md).
"""

from __future__ import annotations

import torch

from vz_edge.host.quant import rtn

SHARES = (1.0, 0.9, 0.8, 0.7)  # of a block's range


def quantize(
    blocks: torch.Tensor, bits: int, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise float32 ``blocks`` [rows, blocks, block_size], which are overwritten.

    ``importance`` is [1, blocks, block_size], none of it negative. Returns uint8 values of the same shape, float32
    scales and uint8 zero points [rows, blocks].
    """
    scales, zero_points = rtn.block_range(blocks, bits)
    best_scales, best_gains = scales, torch.zeros_like(scales)
    whole, weighed = torch.empty_like(blocks), torch.empty_like(blocks)
    for share in SHARES:
        torch.mul(blocks, (scales * share).reciprocal().unsqueeze(-1), out=whole).add_(zero_points.unsqueeze(-1))
        whole.round_().clamp_(0, 2**bits - 1).sub_(zero_points.unsqueeze(-1))
        torch.mul(whole, importance, out=weighed)
        along, size = torch.linalg.vecdot(weighed, blocks), torch.linalg.vecdot(weighed, whole)
        gains = along * along / size
        better = gains > best_gains  # never where all that counts is zero: the gain is then no number
        best_scales = torch.where(better, along / size, best_scales)
        best_gains = torch.where(better, gains, best_gains)
    return rtn.apply(blocks, best_scales, zero_points, bits), best_scales, zero_points.to(torch.uint8)
