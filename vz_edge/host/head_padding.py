"""Attention heads of any even size, for an operator that takes multiples of 16 only.

GroupQueryAttention refuses other head sizes where it rotates. Heads are then stored with zeros in between: both halves
of a head, which the rotation mixes pair by pair, grow by the same number of places. Zeros add nothing to a product, so
queries, keys, values and the output projection give the same numbers as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vz_edge.host.weight import ALL_ROWS, Weight
from vz_edge.recipe import DecoderSpec

MULTIPLE = 16


@dataclass(frozen=True)
class HeadPadding:
    """Heads of ``size`` numbers stored as ``stored``."""

    size: int
    stored: int

    @classmethod
    def of(cls, spec: DecoderSpec) -> HeadPadding:
        """The smallest size that the operator takes."""
        return cls(spec.head_dim, -(-spec.head_dim // MULTIPLE) * MULTIPLE)

    def rows(self, weight: Weight) -> Weight:
        """A weight or bias whose first axis is [heads * size], as [heads * stored]."""
        if self.stored == self.size:
            return weight
        places = self._places(weight.shape[0])
        shape = (weight.shape[0] // self.size * self.stored, *weight.shape[1:])

        def load(rows: slice = ALL_ROWS) -> torch.Tensor:
            values = weight.load()
            padded = torch.zeros(shape, dtype=values.dtype)
            padded[places] = values
            return padded[rows]

        return Weight(weight.name, shape, load)

    def columns(self, weight: Weight) -> Weight:
        """A weight [out, heads * size] as [out, heads * stored]."""
        if self.stored == self.size:
            return weight
        places = self._places(weight.shape[1])
        columns = weight.shape[1] // self.size * self.stored

        def spread(values: torch.Tensor) -> torch.Tensor:
            padded = torch.zeros((*values.shape[:-1], columns), dtype=values.dtype)
            padded[..., places] = values
            return padded

        squares = weight.input_squares
        return Weight(
            weight.name,
            (weight.shape[0], columns),
            lambda rows=ALL_ROWS: spread(weight.load(rows)),
            None if squares is None else spread(squares),
        )

    def table(self, table: np.ndarray) -> np.ndarray:
        """A rotary table [context, size / 2] as [context, stored / 2]."""
        return np.pad(table, ((0, 0), (0, (self.stored - self.size) // 2)))

    def _places(self, length: int) -> torch.Tensor:
        """Where each number of ``length`` = heads * size goes."""
        half = self.size // 2
        within = torch.cat([torch.arange(half), torch.arange(half) + self.stored // 2])
        heads = torch.arange(length // self.size).unsqueeze(1)
        return (heads * self.stored + within).flatten()
