"""The token table on disk: ``embedding.data``, fp16, row-major [rows, hidden].

A prompt needs a few dozen of its 32,000 to 128,000 rows (half a gigabyte at 8B), so the file is memory-mapped
and only the pages with those rows are ever read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vz_edge.errors import CorruptBundleError


class EmbeddingTable:
    """Rows of the table as ``dtype``, the decoder's own precision."""

    def __init__(self, path: Path, hidden_size: int, dtype: np.dtype) -> None:
        size_bytes = path.stat().st_size if path.is_file() else 0
        rows, remainder = divmod(size_bytes, hidden_size * 2)
        if rows == 0 or remainder:
            raise CorruptBundleError(
                f"{path} has {size_bytes} bytes, not a whole number of fp16 rows of {hidden_size}; "
                "export the bundle again"
            )
        self._table = np.memmap(path, dtype=np.float16, mode="r", shape=(rows, hidden_size))
        self._dtype = dtype

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """Embeddings of tokens: [len(ids), hidden]. Raises CorruptBundleError for an id beyond the table."""
        index = np.asarray(ids, dtype=np.int64)
        if len(index) and (index.max() >= len(self._table) or index.min() < 0):
            raise CorruptBundleError(
                f"the tokenizer gave token {int(index.max())}, the embedding table has {len(self._table)} rows; "
                "tokenizer and decoder are of different models"
            )
        return self._table[index].astype(self._dtype)

    def place(self, ids: Sequence[int], image_token_id: int, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings of a prompt [positions, hidden], with each image token replaced by its picture's features.

        ``pictures`` are [tokens, hidden] arrays, one for each image token in ``ids``, in their order.
        """
        places = [position for position, token_id in enumerate(ids) if token_id == image_token_id]
        parts: list[np.ndarray] = []
        start = 0
        for position, features in zip(places, pictures, strict=True):
            parts += [self.rows(ids[start:position]), features.astype(self._dtype, copy=False)]
            start = position + 1
        return np.concatenate([*parts, self.rows(ids[start:])])
