"""Rows of the memory-mapped table, with pictures' features where image tokens stand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vz_edge.device.embedding import EmbeddingTable
from vz_edge.errors import CorruptBundleError

IMAGE = 9
ROWS = np.arange(40, dtype=np.float16).reshape(10, 4)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingTable:
    path = tmp_path_factory.mktemp("table") / "embedding.data"
    ROWS.tofile(path)
    return EmbeddingTable(path, 4, np.dtype(np.float32))


@given(st.lists(st.integers(0, IMAGE), max_size=12), st.data())
def test_features_stand_exactly_where_image_tokens_stood(
    table: EmbeddingTable, ids: list[int], data: st.DataObject
) -> None:
    lengths = [data.draw(st.integers(0, 5)) for _ in range(ids.count(IMAGE))]
    pictures = [np.full((length, 4), -1.0 - i, np.float32) for i, length in enumerate(lengths)]
    remaining = iter(pictures)
    expected = [next(remaining) if token_id == IMAGE else ROWS[[token_id]] for token_id in ids]
    placed = table.place(ids, IMAGE, pictures)
    assert placed.dtype == np.float32
    np.testing.assert_array_equal(placed, np.concatenate([np.empty((0, 4), np.float32), *expected]))


def test_a_token_beyond_the_table_is_a_corrupt_bundle(table: EmbeddingTable) -> None:
    with pytest.raises(CorruptBundleError, match="token 10"):
        table.rows([3, 10])


@pytest.mark.parametrize("size", [0, 7, 12])
def test_a_table_of_broken_rows_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "embedding.data").write_bytes(bytes(size))
    with pytest.raises(CorruptBundleError, match=f"{size} bytes"):
        EmbeddingTable(tmp_path / "embedding.data", 4, np.dtype(np.float32))


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptBundleError):
        EmbeddingTable(tmp_path / "absent", 4, np.dtype(np.float32))
