"""Shards written tensor by tensor are what safetensors reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from vz_edge.host import shards
from vz_edge.host.shards import DTYPE_NAMES, INDEX, write_shards

DTYPES = st.sampled_from(list(DTYPE_NAMES))
SHAPES = st.lists(st.integers(1, 5), max_size=3)


def made(count: int, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 100 + count).to(dtype).reshape(shape)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors by the index, each from the file that it names."""
    found = {}
    for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items():
        with safe_open(folder / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found[name] = opened.get_tensor(name)
    return found


@settings(max_examples=30)
@given(st.lists(st.tuples(DTYPES, SHAPES), min_size=1, max_size=12), st.integers(1, 200))
def test_what_was_written_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[torch.dtype, list[int]]], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"tensor.{number}": made(number, *kind) for number, kind in enumerate(kinds)}
    write_shards(folder, iter(tensors.items()), shard_bytes)
    found = read(folder)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert json.loads((folder / INDEX).read_text())["metadata"]["total_size"] == total


def test_a_header_that_is_full_begins_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "HEADER_BYTES", 1024)
    tensors = {f"a.tensor.with.a.name.{number}": torch.full((3, 7), float(number)) for number in range(20)}
    write_shards(tmp_path, iter(tensors.items()))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for name, tensor in read(tmp_path).items():
        torch.testing.assert_close(tensor, tensors[name])


def test_each_tensor_is_written_before_the_next_is_made(tmp_path: Path) -> None:
    def tensors():
        yield "first", torch.ones(1_000_000)
        (partial,) = tmp_path.iterdir()
        assert partial.stat().st_size == 8 + shards.HEADER_BYTES + 4_000_000
        yield "second", torch.ones(2)

    write_shards(tmp_path, tensors())
