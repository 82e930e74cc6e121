"""The gate lets a sensor's noise pass and sees what is as small as a patch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.device import standin
from vz_edge.bundle import ImageSpec
from vz_edge.device.image import Tiles, make_tiles
from vz_edge.watch.gate import change

SPEC = ImageSpec("stock", (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
MODEL = replace(standin.model_spec("llava"), tower=replace(standin.model_spec().tower, image_size=336))
PATCH = 14
SCENE = np.random.default_rng(0).integers(30, 220, (336, 336, 3)).astype(np.float64)


def tiles(scene: np.ndarray, noise: float = 0.0, seed: int = 0) -> Tiles:
    from PIL import Image

    noisy = scene + np.random.default_rng(seed).normal(0, noise, scene.shape) if noise else scene
    return make_tiles(Image.fromarray(np.rint(noisy).clip(0, 255).astype(np.uint8)), MODEL, SPEC)


def test_it_is_in_grey_levels() -> None:
    assert change(tiles(SCENE), tiles(SCENE), SPEC, PATCH) == 0
    assert change(tiles(SCENE), tiles(SCENE + 5), SPEC, PATCH) == pytest.approx(5, rel=1e-4)
    assert change(tiles(SCENE + 5), tiles(SCENE), SPEC, PATCH) == pytest.approx(5, rel=1e-4)


@pytest.mark.parametrize("noise", [2.0, 5.0])
def test_noise_counts_as_the_formula_says(noise: float) -> None:
    measured = change(tiles(SCENE, noise, seed=1), tiles(SCENE, noise, seed=2), SPEC, PATCH)
    expected = 2 * noise / math.sqrt(math.pi)
    # The most changed of 576 patches of 588 values lies above the mean of all.
    assert expected < measured < 1.25 * expected


def test_the_most_changed_patch_decides_not_the_mean() -> None:
    changed = SCENE.copy()
    changed[14 * 3 : 14 * 4, 14 * 7 : 14 * 8] += 30
    assert change(tiles(SCENE), tiles(changed), SPEC, PATCH) == pytest.approx(30, rel=1e-3)
    striped = SCENE.copy()
    striped[:14, :14] += np.where(np.arange(14) % 2, 20, -20)[None, :, None]  # the patch's mean stays as it was
    assert change(tiles(SCENE), tiles(striped), SPEC, PATCH) == pytest.approx(20, rel=1e-3)


def test_another_size_or_grid_is_another_picture() -> None:
    assert change(tiles(SCENE), tiles(SCENE[:300]), SPEC, PATCH) == math.inf
    one = tiles(SCENE)
    assert change(one, replace(one, grid=(1, 1)), SPEC, PATCH) == math.inf
