"""Draw which patches of a picture a bundle keeps.

    python -m benchmarks.draw_kept_tokens bundles/vz-demo examples/scene.jpg docs/kept-tokens.jpg

Left, the picture as the grid tiles see it, the kept (dominant) patches clear and the others dimmed; right, the same
for the base tile, which sees the whole picture squeezed. Contextual tokens are means of dimmed patches and have no
place of their own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from vz_edge import EdgeModel
from vz_edge.bundle import ImageSpec

DIMMED = 0.3
GAP_PIXELS = 24


def draw(model: EdgeModel, picture: Path) -> Image.Image:
    """The picture with its kept patches clear: the grid, and the base tile beside it."""
    tiles = model.vision.tile(picture)
    kept = model.vision.encode(tiles).kept
    if kept is None or tiles.grid is None:
        raise SystemExit("the bundle keeps all tokens or has no grid: nothing to draw")
    tower = model.manifest.model.tower
    drawn = [
        _dim(_pixels(pixels, model.manifest.image), positions, tower.patch_size)
        for pixels, positions in zip(tiles.pixel_values, kept, strict=True)
    ]
    columns, rows = tiles.grid
    grid = np.vstack([np.hstack(drawn[1 + row * columns : 1 + (row + 1) * columns]) for row in range(rows)])
    height, width = grid.shape[:2]
    side = tower.image_size
    canvas = Image.new("RGB", (width + GAP_PIXELS + side, max(height, side)), "white")
    canvas.paste(Image.fromarray(grid), (0, 0))
    canvas.paste(Image.fromarray(drawn[0]), (width + GAP_PIXELS, 0))
    return canvas


def _pixels(values: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """uint8 [S, S, 3] back from normalised [3, S, S]."""
    mean, std = (np.array(numbers)[:, None, None] for numbers in (spec.mean, spec.std))
    return ((values * std + mean) * 255).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def _dim(pixels: np.ndarray, kept: np.ndarray, patch_size: int) -> np.ndarray:
    """The tile with every patch that is not among the ``kept`` positions (0 is CLS) dimmed."""
    side = pixels.shape[0] // patch_size
    clear = np.zeros(1 + side * side, dtype=bool)
    clear[kept] = True
    mask = np.kron(clear[1:].reshape(side, side), np.ones((patch_size, patch_size), dtype=bool))
    return np.where(mask[..., None], pixels, pixels * DIMMED + 255 * (1 - DIMMED) * 0.9).astype(np.uint8)


def main() -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    draw(EdgeModel.load(arguments.bundle), arguments.picture).save(arguments.out, optimize=True, quality=90)


if __name__ == "__main__":
    main()
