"""Packing of block-quantised weights as ONNX Runtime's MatMulNBits reads them.

A weight of shape [out, in] is cut along ``in`` into blocks of ``block_size`` values; the last block of a row
is padded with zeros. Each block has one scale and one zero point, and stands for ``(q - zero_point) * scale``.

| tensor      | shape                              | dtype | layout |
|-------------|------------------------------------|-------|--------|
| packed      | [out, blocks, block_size*bits/8]   | uint8 | 4 bits: even index in the low half of a byte |
| scales      | [out, blocks]                      | float | |
| zero points | [out, ceil(blocks * bits / 8)]     | uint8 | as ``packed``; absent means 2**(bits-1) |

Source: the MatMulNBits section of ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

import torch


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 values below 2**bits along the last axis (whose length is even at 4 bits)."""
    if bits == 8:
        return q
    pairs = q.view(torch.int16)  # little-endian: the even value in the low byte, the odd one in the high byte
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``pack``: uint8 values below 2**bits."""
    if bits == 8:
        return packed
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def pack_zero_points(zero_points: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 zero points [out, blocks]; an odd count at 4 bits is padded with one zero."""
    if bits == 4 and zero_points.shape[-1] % 2:
        zero_points = torch.nn.functional.pad(zero_points, (0, 1))
    return pack(zero_points.contiguous(), bits)


def dequantize(
    packed: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, bits: int, in_features: int
) -> torch.Tensor:
    """The weight [out, in_features], float32, that MatMulNBits multiplies with."""
    q = unpack(packed, bits).float()
    out_features, blocks, _ = q.shape
    if zero_points is None:
        offset = torch.full((out_features, blocks), float(2 ** (bits - 1)))
    else:
        offset = unpack(zero_points, bits)[:, :blocks].float()
    weight = (q - offset.unsqueeze(-1)) * scales.float().unsqueeze(-1)
    return weight.flatten(1)[:, :in_features]
