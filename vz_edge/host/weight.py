"""Weights that are read when asked for, whole or some rows at a time, and never kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

ALL_ROWS = slice(None)


class Loader(Protocol):
    """Reads a tensor, or only some rows of it, in any float dtype."""

    def __call__(self, rows: slice = ALL_ROWS) -> torch.Tensor:
        """``rows`` selects along the first axis."""


@dataclass(frozen=True)
class Weight:
    """A tensor of a checkpoint.

    ``input_squares`` [in], float32: of a linear layer's weight [out, in], the mean squares of what it is multiplied
    with, where they are known (``vz_edge.host.calibration``).
    """

    name: str
    shape: tuple[int, ...]
    load: Loader
    input_squares: torch.Tensor | None = None


def stacked(name: str, weights: Sequence[Weight]) -> Weight:
    """Weights that read the same and differ only in their number of rows, as one: the first one's rows, then..."""
    rows_in_all = sum(weight.shape[0] for weight in weights)

    def load(rows: slice = ALL_ROWS) -> torch.Tensor:
        start, stop, _ = rows.indices(rows_in_all)
        pieces, first = [], 0
        for weight in weights:
            last = first + weight.shape[0]
            if start < last and first < stop:
                pieces.append(weight.load(slice(max(start - first, 0), min(stop, last) - first)))
            first = last
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return Weight(name, (rows_in_all, *weights[0].shape[1:]), load, weights[0].input_squares)
