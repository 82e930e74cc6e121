"""vz-demo is trained on the tiles that a device makes, and knows what covers their patches."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from training.scenes import make_scenes
from vz_edge.bundle import ImageSpec
from vz_edge.device.image import make_tiles
from vz_edge.recipe import load_recipe

MODEL = load_recipe("vz-demo").model


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as the training's scripts import it, whose folder is on their path."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "training"))
    return importlib.import_module("tiles")


def test_training_sees_the_tiles_of_a_device(tiles: ModuleType) -> None:
    spec = ImageSpec("stock", tiles.CLIP_MEAN, tiles.CLIP_STD)
    counts = set()
    for scene in make_scenes(seed=5, count=8):
        ours = tiles.anyres_tiles(scene.image).astype(np.float32) / 255
        ours = ((ours - np.float32(tiles.CLIP_MEAN)) / np.float32(tiles.CLIP_STD)).transpose(0, 3, 1, 2)
        device = make_tiles(scene.image, MODEL, spec).pixel_values
        np.testing.assert_allclose(ours, device, atol=1e-5)
        counts.add(len(device))
    assert len(counts) > 1


def test_a_patch_knows_what_covers_it(tiles: ModuleType) -> None:
    for scene in make_scenes(seed=6, count=4):
        labels = np.asarray(scene.labels)
        base, *grid = tiles.labelled_tiles(scene)
        for number in range(len(scene.items)):
            share = (labels == number + 1).mean()  # of the picture, which the base tile is
            assert base.cover[number].mean() == pytest.approx(share, rel=0.1)
            assert base.seen[number] == 1 and sum(tile.seen[number] for tile in grid) == pytest.approx(1)
