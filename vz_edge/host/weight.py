"""Weights that are read when asked for, whole or some rows at a time, and never kept."""

from __future__ import annotations

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
    """A tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    load: Loader
