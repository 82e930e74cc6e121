"""The golden vectors (tests/golden/README.md) as test cases."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from vz_edge.budget import TokenBudget
from vz_edge.bundle import ImageSpec
from vz_edge.device.image import load_image, make_tiles
from vz_edge.host.families import spec_from_config
from vz_edge.recipe import ModelSpec

GOLDEN = Path(__file__).parent / "golden"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CHECKPOINTS = ("llava-1.5", "llava-next")
NEAR_TIES = {"llava-next/b2_i2": 4}  # contextual tokens whose members rounding decides


@dataclass(frozen=True)
class Case:
    """One budget and one picture; ``kept`` is sorted here."""

    name: str
    checkpoint: str
    image: str
    budget: TokenBudget
    kept: np.ndarray
    features: np.ndarray
    last_logits: np.ndarray

    @property
    def folder(self) -> Path:
        return GOLDEN / self.checkpoint

    def tiles(self) -> tuple[np.ndarray, tuple[int, int] | None]:
        return golden_tiles(self.checkpoint, self.image)

    def assert_features(self, found: np.ndarray) -> None:
        """Within 1e-4 of the largest value, but for tokens that rounding decides."""
        assert found.shape == self.features.shape
        error = np.abs(found - self.features).max(axis=1) / np.abs(self.features).max()
        assert (error > 1e-4).sum() <= NEAR_TIES.get(self.name, 0), f"{self.name}: {np.sort(error)[-5:]}"
        assert error.max() < 1e-3


def model_spec(checkpoint: str) -> ModelSpec:
    return spec_from_config(json.loads((GOLDEN / checkpoint / "config.json").read_text()))


@cache
def golden_tiles(checkpoint: str, image: str) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Pixel values and the grid (columns, rows) as the published preprocessing makes them."""
    spec = ImageSpec("pad" if checkpoint == "llava-1.5" else "stock", CLIP_MEAN, CLIP_STD)
    tiles = make_tiles(load_image(GOLDEN / checkpoint / f"{image}.png"), model_spec(checkpoint), spec)
    return tiles.pixel_values, tiles.grid


@cache
def cases(checkpoint: str) -> list[Case]:
    with np.load(GOLDEN / checkpoint / "reference.npz") as arrays:
        reference = dict(arrays)
    found = []
    for key in sorted(reference):
        if not key.endswith("_budget"):
            continue
        name = key.removesuffix("_budget")
        found.append(
            Case(
                name=f"{checkpoint}/{name}",
                checkpoint=checkpoint,
                image=name.split("_")[1],
                budget=TokenBudget(*reference[key].tolist()),
                kept=np.sort(reference[f"{name}_keep"].astype(np.int64), axis=1),
                features=reference[f"{name}_features"],
                last_logits=reference[f"{name}_last_logits"],
            )
        )
    return found
