"""Anyres tiles of a picture as uint8, and what covers each 14-pixel patch of them.

Same geometry as transformers' `LlavaNextImageProcessorPil` (bicubic, best grid, centred zero padding, base tile
first) and the same values bit for bit once normalised, but uint8 and several times faster.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scenes import COLOUR_NAMES, SHAPE_NAMES, Scene
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

TILE_PX = 336
PATCH_PX = 14
GRID = TILE_PX // PATCH_PX  # 24 patches a side
PINPOINTS = [[336, 336], [336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # (height, width)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What a patch shows: 0 background, then the shapes, then the digits. Colours: 0 background, digits have none.
WHAT_NAMES = ("background", *SHAPE_NAMES, *"0123456789")
WHAT_INDEX = {name: index for index, name in enumerate(WHAT_NAMES)}
COLOUR_INDEX = {name: index + 1 for index, name in enumerate(COLOUR_NAMES)}


def _canvas(image: Image.Image, resample: Image.Resampling) -> Image.Image:
    """The picture scaled into its best grid resolution and padded with zeros."""
    size_hw = (image.height, image.width)
    height, width = select_best_resolution(size_hw, PINPOINTS)
    shape = np.empty((1, *size_hw), np.uint8)
    new_height, new_width = get_patch_output_size(shape, (height, width), input_data_format="channels_first")
    canvas = Image.new(image.mode, (width, height))
    canvas.paste(
        image.resize((new_width, new_height), resample),
        ((width - new_width) // 2, (height - new_height) // 2),
    )
    return canvas


def anyres_tiles(image: Image.Image, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """(tiles, 336, 336[, 3]) uint8: the whole picture squashed into one tile, then the grid in row-major order."""
    canvas = np.asarray(_canvas(image, resample))
    base = np.asarray(image.resize((TILE_PX, TILE_PX), resample))
    rows, columns = canvas.shape[0] // TILE_PX, canvas.shape[1] // TILE_PX
    grid = canvas.reshape(rows, TILE_PX, columns, TILE_PX, -1).swapaxes(1, 2).reshape(-1, *base.shape)
    return np.concatenate([base[None], grid])


@dataclass(frozen=True)
class LabelledTile:
    """One tile and, for each of its N items, where it is. Coordinates are in tiles (0 to 1 inside the tile)."""

    pixels: np.ndarray  # (336, 336, 3) uint8
    cover: np.ndarray  # (N, 24, 24) float32: share of the patch that the item covers
    seen: np.ndarray  # (N,) which part of the item is inside this tile
    what: np.ndarray  # (N,) index into WHAT_NAMES
    colour: np.ndarray  # (N,) 0 for digits
    place: np.ndarray  # (N, 5) of what is seen: middle x, y; width, height; area / (width * height)


def labelled_tiles(scene: Scene) -> list[LabelledTile]:
    """The tiles of a scene, base tile first."""
    pixels = anyres_tiles(scene.image)
    labels = anyres_tiles(scene.labels, Image.Resampling.NEAREST)[:, ::2, ::2]  # every second pixel is enough
    what = np.array([WHAT_INDEX[item.what] for item in scene.items], int)
    colour = np.array([COLOUR_INDEX.get(item.colour, 0) for item in scene.items], int)
    masks = labels == np.arange(1, len(scene.items) + 1, dtype=np.uint8)[:, None, None, None]  # (N, tiles, 168, 168)
    side = PATCH_PX // 2
    cover = masks.reshape(*masks.shape[:2], GRID, side, GRID, side).mean((3, 5), dtype=np.float32)
    area = cover.mean((2, 3))  # in tiles
    total = np.concatenate([area[:, :1], np.repeat(area[:, 1:].sum(1, keepdims=True), len(labels) - 1, 1)], 1)
    middle_x, width = _extent(masks.any(2))
    middle_y, height = _extent(masks.any(3))
    fill = area / np.maximum(width * height, 1e-6)
    place = np.stack([middle_x, middle_y, width, height, fill], -1)
    seen = area / np.maximum(total, 1e-6)
    return [LabelledTile(pixels[t], cover[:, t], seen[:, t], what, colour, place[:, t]) for t in range(len(labels))]


def _extent(hit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middle and length, as shares of the last axis, of the stretch from the first to the last true value."""
    size = hit.shape[-1]
    first, last = hit.argmax(-1), size - hit[..., ::-1].argmax(-1)
    length = np.where(hit.any(-1), last - first, 0)
    return (first + last) / 2 / size, length / size
