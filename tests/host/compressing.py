"""What the tests of ``vz_edge.compress`` share: tiny models, pictures, and an oracle for the features."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

import vz_edge
from tests.tiny import make_checkpoint
from vz_edge.budget import split_tokens
from vz_edge.device.image import grid_of
from vz_edge.host.families import spec_from_config
from vz_edge.host.vision_graph import reduction

FAMILIES = ("llava", "llava_next")
TOTAL = {"llava": 12, "llava_next": 60}  # 12 tokens a tile: 10 dominant, 2 contextual
SIZES = [(150, 100), (60, 200), (300, 60), (90, 90)]  # (width, height): grids of 2 x 2, 1 x 3, 3 x 1, 2 x 2


class Plain:
    """A tiny checkpoint, its model and its processor; ``compressed`` makes a copy and compresses that."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder, self.family = folder, family
        self.model: Any = make_checkpoint(folder, family)  # type: ignore[arg-type]
        # A plain model that has seen a picture keeps transformers' hooks, with which it cannot be pickled.
        self._unused = copy.deepcopy(self.model)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.spec = spec_from_config(self.model.config.to_dict())

    def compressed(self, tokens: int | None = None) -> tuple[Any, Any]:
        """A compressed copy of the model, and the processor for it."""
        model = copy.deepcopy(self._unused)
        return model, vz_edge.compress(model, self.processor, tokens or TOTAL[self.family])


def pictures(sizes: Sequence[tuple[int, int]] = SIZES) -> list[Image.Image]:
    """Random pictures of these (width, height)."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def inputs_of(processor: Any, count: int = 1, **options: Any) -> Any:
    """One prompt that shows ``count`` pictures."""
    text = "USER: " + "<image>\n" * count + "what? ASSISTANT:"
    return processor(images=pictures()[:count], text=text, return_tensors="pt", **options)


def vision_inputs(inputs: Any) -> dict[str, torch.Tensor]:
    return {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}


def tower_layers(model: Any) -> torch.nn.ModuleList:
    """The tower's layers, one module deeper in early releases of transformers 5."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower).encoder.layers


def tiles_of(inputs: Any, plain: Plain) -> list[tuple[torch.Tensor, int | None]]:
    """Each picture's pixel values [tiles, 3, s, s] and the width of its grid."""
    if plain.family == "llava":
        return [(tile[None], None) for tile in inputs["pixel_values"]]
    found = []
    for values, (height, width) in zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True):
        columns, rows = grid_of((width, height), plain.spec)
        found.append((values[: 1 + columns * rows], columns))
    return found


@torch.no_grad()
def features_by_hooks(
    model: Any, plain: Plain, pixel_values: torch.Tensor, columns: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and kept positions from a run of the *whole* tower of a plain ``model``, watched by hooks."""
    inner, found = model.model, {}
    layer = tower_layers(model)[plain.spec.feature_layer].self_attn
    hooks = [
        getattr(layer, name).register_forward_hook(lambda _m, _i, output, name=name: found.update({name: output}))
        for name in ("q_proj", "k_proj")
    ]
    hidden = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states[plain.spec.feature_layer]
    for hook in hooks:
        hook.remove()
    reduce = reduction(plain.spec, split_tokens(TOTAL[plain.family], plain.spec.max_tiles, 36))
    width = None if columns is None else torch.tensor([columns])
    tokens, kept, *_ = reduce(hidden, found["q_proj"][:, 0], found["k_proj"], width)
    return inner.multi_modal_projector(tokens), kept
