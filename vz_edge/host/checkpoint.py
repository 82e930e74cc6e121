"""Checkpoints: safetensors shards read by name, under one set of names whichever layout the files have.

LLaVA's weights exist under three layouts; ``Checkpoint`` speaks that of transformers >= 4.52 without its
leading ``model.`` and without CLIP's ``vision_model.`` level:

| here                           | transformers >= 4.52                  | older, and llava-hf files    |
|--------------------------------|---------------------------------------|------------------------------|
| language_model.layers.0...     | model.language_model.layers.0...      | language_model.model.layers  |
| lm_head.weight                 | lm_head.weight                        | language_model.lm_head...    |
| vision_tower.encoder...        | model.vision_tower[.vision_model]...  | vision_tower.vision_model... |
| multi_modal_projector.linear_1 | model.multi_modal_projector...        | multi_modal_projector...     |
| image_newline                  | model.image_newline                   | image_newline                |

The original LLaVA code has ``model.layers.0``, ``lm_head.weight``, ``model.mm_projector.0`` and ``.2``,
``model.image_newline``, and the tower as ``model.vision_tower.vision_tower.vision_model``, or as
``vision_model`` in a CLIP repository of its own.

Only headers are read when a checkpoint is opened. Numbers are read with plain reads into a fresh buffer: pages
of a memory map would count as resident memory, and a 13B would look like 26 GB.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vz_edge.errors import CheckpointError, MissingTensorError, TensorShapeError, UnsafeCheckpointError
from vz_edge.host.precheck import check_tensors
from vz_edge.host.safetensors_header import StoredTensor, read_header
from vz_edge.host.weight import ALL_ROWS, Weight

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
RENAMINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.", ""),
        (r"^vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower."),
        (r"^vision_model\.", "vision_tower."),  # a CLIP repository
        (r"^language_model\.model\.", "language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(layers|embed_tokens|norm)\.", r"language_model.\1."),
        (r"^mm_projector\.0\.", "multi_modal_projector.linear_1."),
        (r"^mm_projector\.2\.", "multi_modal_projector.linear_2."),
    )
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Make it with ``Checkpoint.open``.

    ``config`` is the parsed config.json and ``tower_config`` that of a separate tower; ``input_bytes`` is the
    size of all shards.
    """

    folder: Path
    config: dict[str, Any]
    tower_config: dict[str, Any] | None
    input_bytes: int
    tensors: dict[str, StoredTensor] = field(repr=False)

    @classmethod
    def open(cls, folder: Path, tower: Path | None = None) -> Checkpoint:
        """Read the config and the headers of all shards, and those of a separate CLIP checkpoint ``tower``.

        Raises CheckpointError (no config, no weights, a truncated or unreadable shard), MissingTensorError (a
        shard that the index names is absent) and UnsafeCheckpointError (the weights are pickles).
        """
        config = read_json(folder / "config.json")
        shards, tower_shards = _shards(folder), _shards(tower) if tower is not None else []
        apart = {name: t for name, t in _read_shards(tower_shards).items() if name.startswith("vision_tower.")}
        return cls(
            folder=folder,
            config=config,
            tower_config=read_json(tower / "config.json") if tower is not None else None,
            input_bytes=sum(shard.stat().st_size for shard in shards + tower_shards),
            tensors=apart | _read_shards(shards),
        )

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.tensors)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises MissingTensorError."""
        return self._stored(name).shape

    def load(self, name: str, rows: slice = ALL_ROWS) -> torch.Tensor:
        """Read a tensor, or only ``rows`` of its first axis, in the dtype that the file has.

        Raises MissingTensorError, and CheckpointError for a dtype that is no plain number (an already
        quantised checkpoint) or a file that changed since it was opened.
        """
        stored = self._stored(name)
        dtype = DTYPES.get(stored.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{stored.file}: {name} has dtype {stored.dtype}; expected one of {', '.join(DTYPES)}: "
                "use the checkpoint before its quantisation"
            )
        shape, offset = stored.shape, stored.offset
        if rows != ALL_ROWS:
            start, stop, _ = rows.indices(shape[0])
            offset += start * math.prod(shape[1:]) * dtype.itemsize
            shape = (max(0, stop - start), *shape[1:])
        buffer = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        with stored.file.open("rb", buffering=0) as file:
            file.seek(offset)
            _read_into(file, buffer.numpy().data, name)
        return buffer.view(dtype).reshape(shape)

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """The tensor as a lazy weight of a graph. Raises MissingTensorError and TensorShapeError."""
        stored = self._stored(name)
        if stored.shape != tuple(shape):
            raise TensorShapeError(
                f"{stored.file}: {name} has shape {list(stored.shape)}, expected {list(shape)} from config.json; "
                "config and weights are of different models"
            )
        return Weight(name, tuple(shape), lambda rows=ALL_ROWS: self.load(name, rows))

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise MissingTensorError(
                f"{self.folder} has no tensor {name} under any known layout; expected a complete checkpoint of "
                "the model that its config.json describes"
            )
        return self.tensors[name]


def canonical_name(key: str) -> str:
    """The name used here for a tensor that a file calls ``key``."""
    for pattern, replacement in RENAMINGS:
        key = pattern.sub(replacement, key)
    return key


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object of a checkpoint. Raises CheckpointError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; expected a checkpoint's folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected a JSON object; download it again")
    return data


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map; download it again")
        outside = [name for name in set(weight_map.values()) if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside:
            raise CheckpointError(
                f"{folder / INDEX} names {outside[0][:200]!r}, which is not in its folder; download it again"
            )
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise MissingTensorError(
                f"{folder} lacks {len(missing)} of the {len(shards)} shards that {INDEX} names: "
                f"{', '.join(missing)}; download them"
            )
        return shards
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        is_original = "mm_vision_tower" in read_json(folder / "config.json")
        how = (
            "load it with LLaVA's own code, then model"
            if is_original
            else (f"AutoModelForImageTextToText.from_pretrained({str(folder)!r})")
        )
        raise UnsafeCheckpointError(
            f"{folder} has its weights as pickles ({pickles[0]}), which can run code when loaded; convert a copy "
            f"that you trust: {how}.save_pretrained(NEW_FOLDER, safe_serialization=True)"
        )
    raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE}; expected a checkpoint in safetensors")


def _read_shards(shards: list[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        stored = read_header(shard)
        check_tensors(((key, tensor.dtype) for key, tensor in stored.items()), shards[0].parent)
        for key, tensor in stored.items():
            name = canonical_name(key)
            if name in tensors:
                raise CheckpointError(
                    f"{shard} holds {key[:200]} ({name[:200]}), and so does {tensors[name].file}; expected each "
                    "tensor once: save the checkpoint again"
                )
            tensors[name] = tensor
    return tensors


def _read_into(file: Any, buffer: memoryview, name: str) -> None:
    """Fill ``buffer``: one read returns at most 2 GB."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise CheckpointError(f"{file.name} ended inside {name}; it changed while it was read")
        done += count
