"""Writing safetensors shards tensor by tensor, so that no more than one is in memory.

A file begins with a header that says where each tensor lies, which is known only at the end. Its place is therefore
kept free and what it does not need is filled with spaces, as the format allows (safetensors: "the header data may be
trailing padded with whitespace").

Tensors must lie at multiples of their element's size, without gaps. One whose bytes are no multiple of 8 would push
the next one off, so such tensors, all of them small, wait for the end of the file, the widest elements first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch

SHARD_BYTES = 5_000_000_000  # as on the hub
HEADER_BYTES = 1 << 19  # three thousand tensors
ENTRY_BYTES = 160  # at most, besides its name: a tensor's dtype, shape and place in JSON
ALIGNMENT = 8
INDEX = "model.safetensors.index.json"
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``model-0000i-of-0000n.safetensors`` and their index; a shard is closed once it has ``shard_bytes``.

    ``tensors`` are taken one by one, and each is written before the next one is asked for.
    """
    shards: list[_Shard] = []
    for name, tensor in tensors:
        if not shards or shards[-1].is_full(name, shard_bytes):
            if shards:
                shards[-1].close()
            shards.append(_Shard(folder / f"{len(shards)}.partial"))
        shards[-1].add(name, tensor)
        del tensor  # before the next one is made
    shards[-1].close()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard.path.rename(folder / file)
        weight_map |= dict.fromkeys(shard.entries, file)
    index = {"metadata": {"total_size": sum(shard.size_bytes for shard in shards)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")


class _Shard:
    """One file while it is written. ``size_bytes`` counts its tensors, ``entries`` are its header's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, object]] = {}
        self.size_bytes = 0
        self._header_bytes = ENTRY_BYTES
        self._waiting: list[tuple[str, torch.Tensor]] = []
        self._file: BinaryIO = path.open("wb")
        self._file.seek(8 + HEADER_BYTES)

    def is_full(self, name: str, shard_bytes: int) -> bool:
        """Whether the next tensor belongs into another file."""
        return self.size_bytes >= shard_bytes or self._header_bytes + len(name) + ENTRY_BYTES > HEADER_BYTES

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, or let it wait."""
        self._header_bytes += len(name) + ENTRY_BYTES
        if tensor.nbytes % ALIGNMENT:
            self._waiting.append((name, tensor))
        else:
            self._write(name, tensor)

    def close(self) -> None:
        """Write what waited, and the header."""
        for name, tensor in sorted(self._waiting, key=lambda item: -item[1].itemsize):
            self._write(name, tensor)
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}, separators=(",", ":"))
        self._file.seek(0)
        self._file.write(HEADER_BYTES.to_bytes(8, "little") + header.encode().ljust(HEADER_BYTES))
        self._file.close()

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        start = self.size_bytes
        self.size_bytes += self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        offsets = [start, self.size_bytes]
        self.entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
