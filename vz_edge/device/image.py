"""From a picture to tiles: what the vision tower sees, equal bit for bit to the stock processors.

LLaVA-1.5 sees one tile. Stock (transformers): the short edge is resized to the tile and the centre is kept.
Padded (the published evaluation): the picture is first padded to a square with the mean colour.
LLaVA-NeXT sees 1 + columns x rows tiles ("anyres", LLaVA-NeXT blog, 2024-01): the whole picture squeezed into
one base tile, then the picture fitted into the best of the model's grids, row by row, padded with black.

All work is on 8-bit pixels; a table of 256 floats a channel then does rescaling and normalisation at once,
in the same float64 -> float32 steps as transformers, so nothing differs in the last bit.

>>> tiles = make_tiles(load_image("street.jpg"), manifest.model, manifest.image)
>>> tiles.pixel_values.shape, tiles.grid
((5, 3, 336, 336), (2, 2))
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps

from vz_edge.budget import TokenBudget
from vz_edge.bundle import ImageSpec
from vz_edge.device.picture import PictureFile, opened
from vz_edge.errors import ImageError
from vz_edge.recipe import ModelSpec

ImageSource = PictureFile | Image.Image | np.ndarray
Size = tuple[int, int]  # (width, height) in pixels, as Pillow has it

# A picture beside which a robot's largest frame is small; 4 bytes a pixel makes it 716 MB. Twice Pillow's own limit.
MAX_PIXELS = 178_956_970


@dataclass(frozen=True)
class Tiles:
    """A picture as the vision graph takes it.

    ``pixel_values`` is float32 [tiles, 3, S, S]; ``grid`` is (columns, rows) of the tiles after the base tile,
    None for a family without a grid; ``original_size`` is the picture's (width, height) in pixels.
    """

    pixel_values: np.ndarray = field(repr=False)
    grid: tuple[int, int] | None
    original_size: Size


def load_image(source: ImageSource) -> Image.Image:
    """Read a picture as 8-bit RGB, upright.

    ``source`` is a path, the bytes of a picture file, a file that is open for reading bytes, a Pillow image of any
    mode, or a uint8 array [height, width, 3] in RGB order. The EXIF orientation is applied; transparency is laid over
    white, as transformers' processors do. Raises ImageError.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    with opened(source) as (image, name):
        return _upright_rgb(image, name)


def make_tiles(image: Image.Image, model: ModelSpec, spec: ImageSpec) -> Tiles:
    """Tile an RGB picture for ``model``. Raises ImageError where it is too thin to be scaled as ``spec`` says."""
    side = model.tower.image_size
    if model.family == "llava":
        fitted = _pad_to_square(image, spec) if spec.mode == "pad" else image
        scaled_size = _scaled_size(fitted.size, side, spec)
        _check_size(scaled_size, "the picture with its short edge scaled to the tile")
        scaled = fitted if scaled_size == fitted.size else fitted.resize(scaled_size, spec.resample)
        return Tiles(_normalise(_centre(scaled, side)[None], spec), None, image.size)
    columns, rows = grid = grid_of(image.size, model)
    base = image.resize((side, side), spec.resample)
    tiles = np.empty((1 + columns * rows, side, side, 3), dtype=np.uint8)
    tiles[0] = np.asarray(base)
    tiles[1:] = _grid_tiles(image, grid, side, spec.resample)
    return Tiles(_normalise(tiles, spec), grid, image.size)


def grid_of(size: Size, model: ModelSpec) -> tuple[int, int]:
    """(columns, rows) of the grid that ``model`` lays over a picture of ``size``."""
    return best_grid(size, model.grid_pinpoints, model.tower.image_size)


def best_grid(size: Size, pinpoints: tuple[tuple[int, int], ...], side: int) -> tuple[int, int]:
    """(columns, rows) of the grid that keeps most of a picture of ``size``, then wastes least; then the first one.

    ``pinpoints`` are the resolutions to choose from, (height, width) in pixels; ``side`` is a tile's.
    """
    width, height = size

    def quality(pinpoint: tuple[int, int]) -> tuple[int, int]:
        pin_height, pin_width = pinpoint
        scale = min(pin_width / width, pin_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - pin_width * pin_height

    best_height, best_width = max(pinpoints, key=quality)
    return best_width // side, best_height // side


def tile_boxes(size: Size, model: ModelSpec, spec: ImageSpec) -> np.ndarray:
    """Where each tile lies in a picture of ``size``: float64 [tiles, 4], left, top, right, bottom in its pixels.

    A tile reaches beyond the picture where that was padded. The base tile of a grid is the whole picture, squeezed.
    """
    side = model.tower.image_size
    if model.family == "llava":
        edge = max(size)
        fitted = (edge, edge) if spec.mode == "pad" else size
        scaled = _scaled_size(fitted, side, spec)
        corners = [((scaled[0] - side) // 2, (scaled[1] - side) // 2)]
        padding = (fitted[0] - size[0]) // 2, (fitted[1] - size[1]) // 2
        return _boxes(corners, side, (fitted[0] / scaled[0], fitted[1] / scaled[1]), padding)
    columns, rows = grid_of(size, model)
    grid_size = columns * side, rows * side
    scaled = _fit(size, grid_size)
    left, top = (grid_size[0] - scaled[0]) // 2, (grid_size[1] - scaled[1]) // 2
    corners = [(column * side - left, row * side - top) for row in range(rows) for column in range(columns)]
    boxes = _boxes(corners, side, (size[0] / scaled[0], size[1] / scaled[1]), (0, 0))
    return np.concatenate([[[0, 0, *size]], boxes])


def tile_count(size: Size, model: ModelSpec) -> int:
    """Tiles of a picture of ``size`` (width, height), the base tile counted."""
    if model.family == "llava":
        return 1
    columns, rows = grid_of(size, model)
    return 1 + columns * rows


def token_count(size: Size, model: ModelSpec, budget: TokenBudget | None) -> int:
    """Tokens that a picture of ``size`` (width, height) costs; ``budget`` None means all tokens, unpadded."""
    if budget is not None:
        return budget.total(tile_count(size, model))
    if model.family == "llava":
        return model.all_tokens_per_tile
    patches = model.tower.patches
    top, bottom, left, right = _unpadded_box(size, grid_of(size, model), model.tower.patches_per_side)
    return patches + (bottom - top) * (right - left + 1)


def vanilla_token_order(original_size: Size, grid: tuple[int, int], patches_per_side: int) -> np.ndarray:
    """The order of all tokens in an unreduced LLaVA-NeXT: int64 [tokens].

    Indices point into the patch features of all tiles, tile after tile, followed by one newline row. The base tile
    comes first; then the grid row by row, cut to what is not padding, with a newline after each row.
    """
    columns, rows = grid
    side = patches_per_side
    patches = side * side
    tiles = np.arange(patches, patches * (1 + columns * rows), dtype=np.int64)
    plane = tiles.reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, columns * side)
    top, bottom, left, right = _unpadded_box(original_size, grid, side)
    kept = plane[top:bottom, left:right]
    newline = np.full((len(kept), 1), patches * (1 + columns * rows), dtype=np.int64)
    return np.concatenate([np.arange(patches, dtype=np.int64), np.hstack([kept, newline]).ravel()])


def _unpadded_box(size: Size, grid: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """Rows and columns (top, bottom, left, right) of the grid's patches that the picture covers.

    The order of the floating-point operations is transformers' own: another order rounds other sizes differently.
    """
    width, height = size
    columns, rows = grid[0] * side, grid[1] * side
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return padding, rows - padding, 0, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, rows, padding, columns - padding


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"picture array has shape {array.shape} and dtype {array.dtype}; "
            "expected uint8 [height, width, 3] in RGB order"
        )
    _check_size((array.shape[1], array.shape[0]), "picture array")
    return Image.fromarray(np.ascontiguousarray(array))


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_size(image.size, name)
    image.load()
    has_16_bits = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format == "PNG"
    )  # the latter: Pillow 10
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image, has_16_bits, name)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data, which say nothing about the pixels and no orientation
        return image


def _eight_bit(image: Image.Image, has_16_bits: bool, name: str) -> Image.Image:
    """A grey picture of integers or floats as mode L; Pillow's own ``convert`` would cut off what is above 255.

    16 bits keep their upper 8, as Pillow reads a colour PNG of 16 bits; floats are taken from 0 (black) to 1 (white),
    other integers from 0 to 255. Raises ImageError for other values, of which nobody can tell what is white.
    """
    pixels = np.asarray(image)
    white = 1 if image.mode == "F" else 65535 if has_16_bits else 255
    if not ((pixels >= 0) & (pixels <= white)).all():  # NaN is neither
        raise ImageError(
            f"{name} has pixels of Pillow's mode {image.mode} from {pixels.min():g} to {pixels.max():g}; expected 0 "
            f"(black) to {white} (white): scale them, or save the picture with 8 bits"
        )
    grey = pixels >> 8 if has_16_bits else np.round(pixels * (255 / white))
    transparent = image.info.get("transparency")  # of a PNG: the grey value that is see-through
    if isinstance(transparent, int):
        grey = np.where(pixels == transparent, 255, grey)
    return Image.fromarray(grey.astype(np.uint8))


def _check_size(size: Size, name: str) -> None:
    width, height = size
    if width == 0 or height == 0:
        raise ImageError(f"{name} is {width} x {height} pixels: there is nothing to see; expected at least 1 x 1")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} is {width} x {height} pixels, more than the limit of {MAX_PIXELS}; scale it down first"
        )


def _grid_tiles(image: Image.Image, grid: tuple[int, int], side: int, resample: int) -> np.ndarray:
    """The grid's tiles, row by row: uint8 [columns * rows, S, S, 3]."""
    columns, rows = grid
    grid_width, grid_height = columns * side, rows * side
    width, height = _fit(image.size, (grid_width, grid_height))
    canvas = np.zeros((grid_height, grid_width, 3), dtype=np.uint8)
    top, left = (grid_height - height) // 2, (grid_width - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(image.resize((width, height), resample))
    return canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)


def _fit(size: Size, grid_size: Size) -> Size:
    """The largest size with the proportions of ``size`` that fits into ``grid_size``."""
    scale_x, scale_y = grid_size[0] / size[0], grid_size[1] / size[1]
    if scale_x < scale_y:
        return grid_size[0], min(math.ceil(size[1] * scale_x), grid_size[1])
    return min(math.ceil(size[0] * scale_y), grid_size[0]), grid_size[1]


def _pad_to_square(image: Image.Image, spec: ImageSpec) -> Image.Image:
    edge = max(image.size)
    _check_size((edge, edge), "the picture padded to a square")
    square = Image.new("RGB", (edge, edge), tuple(int(mean * 255) for mean in spec.mean))
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square


def _scaled_size(size: Size, side: int, spec: ImageSpec) -> Size:
    """What a picture of ``size`` is scaled to before its centre is cut out as a tile of ``side``."""
    if not spec.resize:
        return size
    if spec.exact_size is not None:
        height, width = spec.exact_size
        return width, height
    width, height = size
    short_edge = spec.short_edge or side
    if width <= height:
        return short_edge, int(short_edge * height / width)
    return int(short_edge * width / height), short_edge


def _centre(image: Image.Image, side: int) -> np.ndarray:
    """The centre of a picture, uint8 [side, side, 3], on black where it is smaller than that."""
    left, top = ((length - side) // 2 for length in image.size)  # negative where the picture is the smaller one
    return np.asarray(image.crop((left, top, left + side, top + side)))


def _boxes(corners: list[Size], side: int, scale: tuple[float, float], padding: Size) -> np.ndarray:
    """Squares of ``side`` at ``corners`` of the scaled picture, in the pixels of the picture without its padding."""
    boxes = np.array([[left, top, left + side, top + side] for left, top in corners], dtype=np.float64)
    return boxes * np.tile(scale, 2) - np.tile(padding, 2)


def _normalise(tiles: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """uint8 [tiles, S, S, 3] -> float32 [tiles, 3, S, S]."""
    pixel_values = np.empty((len(tiles), 3, *tiles.shape[1:3]), dtype=np.float32)
    for channel, table in enumerate(_normalisation_tables(spec)):
        np.take(table, tiles[..., channel], out=pixel_values[:, channel], mode="clip")
    return pixel_values


def _normalisation_tables(spec: ImageSpec) -> Iterator[np.ndarray]:
    rescaled = (np.arange(256, dtype=np.float64) * spec.rescale_factor).astype(np.float32)
    for mean, std in zip(spec.mean, spec.std, strict=True):
        yield (rescaled - np.float32(mean)) / np.float32(std)
