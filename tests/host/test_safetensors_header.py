"""Headers of safetensors files: what the format's own library refuses is refused, what it reads is read alike."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vz_edge.errors import CheckpointError
from vz_edge.host.safetensors_header import BITS, read_header

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "empty": torch.zeros(0, 5),
    "scalar": torch.tensor(7, dtype=torch.int64),
}
Header = dict[str, Any]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def split(file: Path) -> tuple[Header, bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(file: Path, header: Header | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def library_refuses(file: Path) -> bool:
    try:
        with safe_open(str(file), "pt") as opened:
            opened.keys()
    except (SafetensorError, OSError):
        return True
    return False


def test_what_is_written_is_found_where_it_lies(file: Path) -> None:
    found = read_header(file)
    assert set(found) == set(TENSORS)
    content = file.read_bytes()
    for name, tensor in TENSORS.items():
        stored = found[name]
        assert stored.shape == tuple(tensor.shape)
        raw = tensor.contiguous().view(torch.uint8).numpy() if tensor.ndim else np.array([7]).view(np.uint8)
        assert content[stored.offset : stored.offset + raw.nbytes] == raw.tobytes()


def a_gap(header: Header, data: bytes) -> bytes:
    first, last = header["b.weight"]["data_offsets"]
    header["b.weight"]["data_offsets"] = [first + 8, last + 8]
    return data + bytes(8)


def an_overlap(header: Header, data: bytes) -> bytes:
    header["b.weight"]["data_offsets"] = [0, 12]
    return data


def reversed_offsets(header: Header, data: bytes) -> bytes:
    header["a.weight"]["data_offsets"].reverse()
    return data


def another_shape(header: Header, data: bytes) -> bytes:
    header["a.weight"]["shape"] = [3, 5]
    return data


def swapped_axes(header: Header, data: bytes) -> bytes:
    header["a.weight"]["shape"] = [3, -4]
    return data


def another_dtype(header: Header, data: bytes) -> bytes:
    header["a.weight"]["dtype"] = "F16"
    return data


def no_dtype(header: Header, data: bytes) -> bytes:
    header["a.weight"]["dtype"] = "F12"
    return data


def a_float_offset(header: Header, data: bytes) -> bytes:
    header["a.weight"]["data_offsets"] = [float(number) for number in header["a.weight"]["data_offsets"]]
    return data


def a_huge_shape(header: Header, data: bytes) -> bytes:
    header["a.weight"]["shape"] = [2**62, 2**62]
    return data


def three_offsets(header: Header, data: bytes) -> bytes:
    header["a.weight"]["data_offsets"].append(48)
    return data


def more_data(header: Header, data: bytes) -> bytes:
    return data + b"more"


def less_data(header: Header, data: bytes) -> bytes:
    return data[:-1]


def bad_metadata(header: Header, data: bytes) -> bytes:
    header["__metadata__"] = {"format": 1}
    return data


def a_list(header: Header, data: bytes) -> bytes:
    header["a.weight"] = []
    return data


def a_null(header: Header, data: bytes) -> bytes:
    header["a.weight"]["shape"] = None
    return data


@pytest.mark.parametrize(
    "change",
    [
        a_gap, an_overlap, reversed_offsets, another_shape, swapped_axes, another_dtype, no_dtype, a_float_offset,
        a_huge_shape, three_offsets, more_data, less_data, bad_metadata, a_list, a_null,
    ],
)  # fmt: skip
def test_what_the_library_refuses_is_refused_in_one_line(file: Path, change: Callable[[Header, bytes], bytes]) -> None:
    header, data = split(file)
    join(file, header, change(header, data))
    assert library_refuses(file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        read_header(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b" {}",
        b"null",
        b"{}{}",
        b'{"a": 1}',
        b'{"a": NaN}',
        b"\xff\xfe",
        b'{"a":' * 2000,
        b"[" * 99999,
    ],
)
def test_headers_that_are_no_object_of_tensors_are_refused(file: Path, text: bytes) -> None:
    join(file, text, b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(file)


def test_a_name_that_is_there_twice_is_refused(file: Path) -> None:
    one = '"a": {"dtype": "U8", "shape": [%d], "data_offsets": [0, %d]}'
    join(file, ("{" + one % (4, 4) + ", " + one % (8, 8) + "}").encode(), bytes(8))
    with pytest.raises(CheckpointError, match="a is there twice"):
        read_header(file)


def test_a_header_longer_than_the_file_or_the_format_allows_is_refused(file: Path) -> None:
    file.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="cut off"):
        read_header(file)
    with file.open("wb") as sparse:
        sparse.write((200_000_000).to_bytes(8, "little"))
        sparse.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="the format allows"):
        read_header(file)


def test_pipes_folders_and_devices_are_no_shards(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in (tmp_path / "fifo", tmp_path / "folder", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a plain file"):
            read_header(name)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "nothing")


def test_every_dtype_of_the_library_is_known() -> None:
    import safetensors.torch

    assert set(safetensors.torch._TYPES) <= set(BITS)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_whatever_is_changed_in_a_header_both_readers_agree(file: Path, seed: int) -> None:
    """Random bytes of the header and of its length: nothing is read that the library refuses."""
    save_file(TENSORS, file)
    rng = random.Random(seed)
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(8 + length) if rng.random() < 0.9 else rng.randrange(8)
        content[place] = rng.choice(b'0123456789[]{},:"-.eE \x00\xffFBUI')
    if rng.random() < 0.2:
        content = content[: rng.randrange(len(content))]
    file.write_bytes(content)
    try:
        found = read_header(file)
    except CheckpointError:
        return
    assert not library_refuses(file)
    with safe_open(str(file), "pt") as opened:
        assert {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()} == {  # noqa: SIM118
            name: stored.shape for name, stored in found.items()
        }
