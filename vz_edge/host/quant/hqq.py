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
    for _ in range(ROUNDS):
        q = _rounded(blocks, scales, zero_points, bits)
        centred = q - zero_points.unsqueeze(-1)
        restored = centred * scales.unsqueeze(-1)
        residual = blocks - restored
        errors = residual.square().sum(-1)
        better = errors < best_errors
        best_errors = torch.where(better, errors, best_errors)
        best_scales = torch.where(better, scales, best_scales)
        best_zero_points = torch.where(better, zero_points, best_zero_points)
        limit = (scales * SHRINKAGE_STEPS).unsqueeze(-1)
        target = restored.add_(residual.clamp_(-limit, limit))  # w - e
        fitted = (target * centred).sum(-1) / centred.square().sum(-1).clamp_(min=1)
        scales = torch.where(fitted > 0, fitted, scales)
        zero_points = (q.mean(-1) - target.mean(-1) / scales).round_().clamp_(0, 2**bits - 1)
    return rtn.apply(blocks, best_scales, best_zero_points, bits), best_scales, best_zero_points.to(torch.uint8)


def _rounded(blocks: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, bits: int) -> torch.Tensor:
    q = blocks * scales.reciprocal().unsqueeze(-1)
    return q.add_((zero_points + 0.5).unsqueeze(-1)).clamp_(0, 2**bits - 0.5).floor_()
