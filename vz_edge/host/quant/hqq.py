"""Half-quadratic quantisation (HQQ, Badri and Shaji 2023): scales and zero points that lower the error, without data.

Minimises a norm of ``w - (q - z) * s`` that forgives outliers, by splitting off what an outlier misses:

1. ``q`` is ``w`` rounded to the grid of ``s`` and ``z``; ``e``, the outliers' share, is the residual shrunk towards
   zero by a third of a step. With the paper's norm below 1 the shrinkage costs a power a value; with the norm 1,
   taken here, it is one clamp, and the error came out the same.
2. ``s`` and ``z`` are fitted to ``w - e`` by least squares. ``z`` is rounded, because MatMulNBits takes whole zero
   points on its int8 path; the paper keeps it a fraction and ``s`` fixed.

Each block keeps the round with the smallest squared error, so none is worse than round to nearest, where it starts.
"""

from __future__ import annotations

import torch

from vz_edge.host.quant import rtn

ROUNDS = 10
SHRINKAGE_STEPS = 1 / 3


def quantize(blocks: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise float32 ``blocks`` [rows, blocks, block_size], which are overwritten.

    Returns uint8 values of the same shape, float32 scales and uint8 zero points [rows, blocks].
    """
    scales, zero_points = rtn.block_range(blocks, bits)
    best_scales, best_zero_points = scales, zero_points
    best_errors = torch.full_like(scales, torch.inf)
    residual, centred = torch.empty_like(blocks), torch.empty_like(blocks)
    for _ in range(ROUNDS):  # all in steps, that is, divided by the scale
        torch.mul(blocks, scales.reciprocal().unsqueeze(-1), out=residual).add_(zero_points.unsqueeze(-1))
        torch.round(residual, out=centred).clamp_(0, 2**bits - 1)
        residual.sub_(centred)
        centred.sub_(zero_points.unsqueeze(-1))
        errors = torch.linalg.vector_norm(residual, dim=-1) * scales
        better = errors < best_errors
        best_errors = torch.where(better, errors, best_errors)
        best_scales = torch.where(better, scales, best_scales)
        best_zero_points = torch.where(better, zero_points, best_zero_points)
        target = residual.clamp_(-SHRINKAGE_STEPS, SHRINKAGE_STEPS).add_(centred)  # w - e
        growth = torch.linalg.vecdot(target, centred) / torch.linalg.vecdot(centred, centred).clamp_(min=1)
        growth.masked_fill_(growth <= 0, 1)
        shift = centred.mean(-1) - target.mean(-1) / growth
        scales = scales * growth
        zero_points = (zero_points + shift).round_().clamp_(0, 2**bits - 1)
    return rtn.apply(blocks, best_scales, best_zero_points, bits), best_scales, best_zero_points.to(torch.uint8)
