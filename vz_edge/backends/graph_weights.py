"""The weights in an ONNX file as torch tensors, where neither onnx nor onnxruntime has to be installed.

An ONNX file is a message of Protocol Buffers whose wire format is a list of (field number, value). Of it four levels
are read: model, graph, initializer, and where in the file beside it an initializer lies. Source of the field numbers:
onnx.proto (ONNX 1.18); of the wire format: the encoding guide of Protocol Buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vz_edge.errors import CorruptBundleError

GRAPH, INITIALIZER = 7, 5  # of ModelProto, of GraphProto
DIMS, DATA_TYPE, NAME, RAW_DATA, EXTERNAL_DATA = 1, 2, 8, 9, 13  # of TensorProto
KEY, VALUE = 1, 2  # of StringStringEntryProto
DTYPES = {1: torch.float32, 10: torch.float16}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def read_weights(path: Path) -> dict[str, Tensor]:
    """Initializers of ``path`` in float32 or float16, by name.

    Those outside of the graph are views of ``path.data``, which is mapped: no page of it is read here. Raises
    CorruptBundleError.
    """
    data = path.with_name(f"{path.name}.data")
    try:
        mapped = torch.from_file(str(data), shared=False, size=data.stat().st_size, dtype=torch.uint8)
        tensors = [
            _message(tensor)
            for graph in _message(memoryview(path.read_bytes()))[GRAPH]
            for tensor in _message(graph).get(INITIALIZER, [])
        ]
        return {bytes(tensor[NAME][0]).decode(): _tensor(tensor, mapped) for tensor in tensors if _is_float(tensor)}
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
    ) as error:  # torch refuses views with RuntimeError
        raise CorruptBundleError(
            f"{path} cannot be read as an ONNX graph ({type(error).__name__}: {' '.join(str(error).split())}); export "
            "the bundle again"
        ) from error


def _is_float(tensor: dict[int, list]) -> bool:
    return tensor[DATA_TYPE][0] in DTYPES


def _tensor(tensor: dict[int, list], mapped: Tensor) -> Tensor:
    shape, dtype = _integers(tensor.get(DIMS, [])), DTYPES[tensor[DATA_TYPE][0]]
    if EXTERNAL_DATA not in tensor:
        return torch.frombuffer(bytearray(tensor[RAW_DATA][0]), dtype=dtype).view(shape)
    place = {bytes(entry[KEY][0]): bytes(entry[VALUE][0]) for entry in map(_message, tensor[EXTERNAL_DATA])}
    start, length = int(place.get(b"offset", b"0")), math.prod(shape) * dtype.itemsize
    return mapped[start : start + length].view(dtype).view(shape)


def _integers(values: list) -> list[int]:
    """A repeated integer field: packed into bytes, or a value each."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        position = 0
        while position < len(value):
            number, position = _varint(value, position)
            found.append(number)
    return found


def _message(data: memoryview) -> dict[int, list]:
    """Values by field number, in their order: integers, or bytes as views of ``data``."""
    found: dict[int, list] = {}
    for number, value in _fields(data):
        found.setdefault(number, []).append(value)
    return found


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if kind == BYTES:
            length, position = _varint(data, position)
        else:
            length = {FIXED64: 8, FIXED32: 4}[kind]
        if position + length > len(data):
            raise ValueError("it ends early")
        yield number, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """An integer in groups of 7 bits, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
