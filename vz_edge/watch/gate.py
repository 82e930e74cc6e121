"""Whether a picture differs from one that was read before: the patch that changed most decides.

A mean over the whole picture would not see what is small in it. A patch is the smallest thing that the tower sees:
a token is made of it.

Noise alone changes a patch too. Between two pictures of a scene that stands still, whose pixels have Gaussian noise of
standard deviation s, the mean absolute difference is 2 s / sqrt(pi), since the difference of two such values has
standard deviation s sqrt(2), and E|x| = sqrt(2 / pi) of that. A threshold of t grey levels so lets noise pass that has
s below 0.886 t by the margin that a patch's few hundred values need; and an object that covers a share a of a patch is
noticed where it differs from what it hides by more than t / a grey levels.
"""

from __future__ import annotations

import numpy as np

from vz_edge.bundle import ImageSpec
from vz_edge.device.image import Tiles


def change(before: Tiles, now: Tiles, spec: ImageSpec, patch_size: int) -> float:
    """Mean absolute difference of the patch that changed most, in grey levels of 255.

    Over the pixels and channels of the patch, in all tiles. Infinite where the pictures differ in size.
    """
    if before.original_size != now.original_size or before.grid != now.grid:
        return np.inf
    tiles, channels, side, _ = now.pixel_values.shape
    grey_levels = np.asarray(spec.std, np.float32) / np.float32(spec.rescale_factor)  # that one unit stands for
    difference = np.einsum("tchw,c->thw", np.abs(now.pixel_values - before.pixel_values), grey_levels) / channels
    count = side // patch_size
    patches = difference[:, : count * patch_size, : count * patch_size].reshape(
        tiles, count, patch_size, count, patch_size
    )
    return float(patches.mean(axis=(2, 4)).max())
