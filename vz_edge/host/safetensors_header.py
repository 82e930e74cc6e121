"""The header of a safetensors file, read as strictly as the format's own library reads it.

A file is the length of its header (8 bytes, little-endian), the header, and the numbers. The header is a JSON object
of tensors, ``{"name": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [0, 16]}}``, and of ``__metadata__``, strings
by name. The byte ranges of the tensors, counted from the header's end, lie one behind another, without a gap or an
overlap, from 0 to the end of the file; each is as long as dtype and shape say.

Source: the format's description in huggingface/safetensors, README.md ("Format"), and ``safetensors/src/tensor.rs``.
A header that breaks it can be read in two ways, and weights that are read in another way answer nonsense.
"""

from __future__ import annotations

import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vz_edge.errors import CheckpointError

MOST_HEADER_BYTES = 100_000_000  # tensor.rs: MAX_HEADER_SIZE
MOST_SIZE = 2**63  # of an axis or of a tensor, in bits: what other readers can count
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``offset`` is its first byte in the file."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name. Raises CheckpointError, also for what is no plain file."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for
            raise CheckpointError(f"{file} is not a plain file; expected a safetensors file")
        with file.open("rb") as stream:
            return _tensors(file, stream, file.stat().st_size)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); download it again") from error


def _tensors(file: Path, stream: BinaryIO, size: int) -> dict[str, StoredTensor]:
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or 8 + length > size:
        raise CheckpointError(f"{file} has {size} bytes and is cut off inside its header; download it again")
    if length > MOST_HEADER_BYTES:
        raise _malformed(file, f"it has {length} bytes, the format allows {MOST_HEADER_BYTES}")
    text = stream.read(length)
    if not text.startswith(b"{"):
        raise _malformed(file, "it does not begin with {")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _malformed(file, str(error) or type(error).__name__) from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed(file, "__metadata__ is not strings by name")
    start = 8 + length
    ranges = {name: _range(file, name, entry) for name, entry in header.items()}
    end = 0
    for name, (first, last) in sorted(ranges.items(), key=lambda item: item[1]):
        if first != end:
            what = "overlap" if first < end else "have a gap between them"
            raise _malformed(file, f"tensors {what} at byte {min(first, end)}, before {name[:80]}")
        end = last
    if size < start + end:
        raise CheckpointError(f"{file} is truncated: {size} bytes, expected {start + end}; download it again")
    if size > start + end:
        raise _malformed(file, f"{size - start - end} bytes at the end of the file belong to no tensor")
    return {
        name: StoredTensor(file, start + ranges[name][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }


def _range(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor, checked against its dtype and shape."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(file, f"{name[:80]} has not dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _malformed(file, f"{name[:80]} has dtype {str(dtype)[:40]}, which the format does not have")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        whole = isinstance(numbers, list) and all(type(number) is int and 0 <= number < MOST_SIZE for number in numbers)
        if not whole:
            raise _malformed(file, f"{name[:80]} has {what} {str(numbers)[:80]}; expected whole numbers from 0")
    if len(offsets) != 2:
        raise _malformed(file, f"{name[:80]} has {len(offsets)} data_offsets; expected 2")
    first, last = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits >= MOST_SIZE or bits % 8 or last - first != bits // 8:
        raise _malformed(
            file, f"{name[:80]} has bytes {first} to {last}, and {dtype} {str(shape)[:80]} is {bits / 8:g} bytes"
        )
    return first, last


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{double[:80]} is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _malformed(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a safetensors file (its header is malformed: {reason}); download it again")
