"""Half-quadratic quantisation (Badri and Shaji, 2023): scales and zero points that lower the error, without data."""

from __future__ import annotations

from vz_edge.host.quant.rtn import quantize

__all__ = ["quantize"]
