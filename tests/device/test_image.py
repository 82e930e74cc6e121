"""Pictures become the same tiles, to the last bit, as in the stock processors and the published code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vz_edge.budget import TokenBudget
from vz_edge.bundle import ImageSpec
from vz_edge.device import image as device_image
from vz_edge.device.image import (
    grid_of,
    load_image,
    make_tiles,
    tile_boxes,
    tile_count,
    token_count,
    vanilla_token_order,
)
from vz_edge.errors import ImageError
from vz_edge.recipe import DecoderSpec, ModelSpec, TowerSpec

GOLDEN = Path(__file__).parent.parent / "golden"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ODD_SIZES = [(1, 1), (1, 2), (2, 1), (7, 333), (336, 336), (337, 335), (640, 480), (671, 673), (1009, 335), (50, 1500)]
SLIVERS = [(4000, 3), (3, 4000)]

DECODER = DecoderSpec("llama", 8, 16, 1, 2, 2, 4, 512, 4096)


def llava(side: int = 336) -> ModelSpec:
    return ModelSpec("llava", DECODER, 511, tower=TowerSpec(image_size=side))


def llava_next(side: int = 336, pinpoints: tuple[tuple[int, int], ...] = PINPOINTS) -> ModelSpec:
    return ModelSpec("llava_next", DECODER, 511, tower=TowerSpec(image_size=side), grid_pinpoints=pinpoints)


def image_spec(mode: str = "stock") -> ImageSpec:
    return ImageSpec(mode, CLIP_MEAN, CLIP_STD)  # type: ignore[arg-type]


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """A picture with both smooth parts and edges, so that resampling and rounding show."""
    width, height = size
    channels = len(Image.new(mode, (1, 1)).getbands())
    rng = np.random.default_rng(width * 10007 + height)
    y, x = np.mgrid[:height, :width]
    smooth = (127 + 120 * np.sin(x / 19 + y / 31))[..., None] * np.linspace(0.6, 1, channels)
    pixels = np.where(rng.random((height, width, 1)) < 0.3, rng.integers(0, 256, (height, width, channels)), smooth)
    array = pixels.astype(np.uint8)
    return Image.fromarray(array[..., 0] if channels == 1 else array, mode)


def stock(image: Image.Image, model: ModelSpec, mode: str) -> np.ndarray:
    """What transformers' PIL processors make of it: float32 [tiles, 3, S, S]."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    side = model.tower.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if model.family == "llava_next":
        processor = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=[list(p) for p in model.grid_pinpoints])
        return processor(image, return_tensors="np")["pixel_values"][0]
    if mode == "pad":
        return LlavaImageProcessorPil(**sizes, do_pad=True)(image, return_tensors="np")["pixel_values"]
    return CLIPImageProcessorPil(**sizes)(image, return_tensors="np")["pixel_values"]


def assert_same_bits(image: Image.Image, model: ModelSpec, mode: str = "stock") -> None:
    expected = stock(ImageOps.exif_transpose(image), model, mode)
    found = make_tiles(load_image(image), model, image_spec(mode)).pixel_values
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
@pytest.mark.parametrize("mode", ["stock", "pad"])
def test_llava_tiles_equal_the_stock_processor(size: tuple[int, int], mode: str) -> None:
    assert_same_bits(noise(size), llava(), mode)


@pytest.mark.parametrize("size", SLIVERS, ids=str)
def test_slivers_equal_the_stock_processor(size: tuple[int, int]) -> None:
    assert_same_bits(noise(size), llava(side=28))  # 336 takes transformers gigabytes; the arithmetic is the same
    assert_same_bits(noise((size[0] // 4, size[1] // 4) if min(size) > 3 else size), llava(side=28), "pad")


@pytest.mark.parametrize("size", [*ODD_SIZES, *SLIVERS], ids=str)
def test_llava_next_tiles_equal_the_stock_processor(size: tuple[int, int]) -> None:
    assert_same_bits(noise(size), llava_next())


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("family", [llava, llava_next])
def test_pixel_modes_equal_the_stock_processor(mode: str, family) -> None:
    assert_same_bits(noise((301, 207), mode), family(side=28, **pinpoints_of(family)))


@pytest.mark.parametrize("mode", ["1", "P", "I", "transparent P"])
@pytest.mark.parametrize("family", [llava, llava_next])
def test_odd_modes_equal_the_stock_processor(mode: str, family) -> None:
    grey = np.asarray(noise((301, 207), "L"))
    image = {
        "1": lambda: Image.fromarray(grey).convert("1"),
        "P": lambda: noise((301, 207)).quantize(64),
        "I": lambda: Image.fromarray(grey.astype(np.int32)),
        "transparent P": lambda: transparent_palette((301, 207)),
    }[mode]()
    assert_same_bits(image, family(side=28, **pinpoints_of(family)))


RAMP = np.linspace(0, 1, 64 * 60).reshape(60, 64)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("grey16.png", (RAMP * 65535).astype(np.uint16)),
        ("grey16.tiff", (RAMP * 65535).astype(np.uint16)),
        ("big-endian.tiff", (RAMP * 65535).astype(">u2")),
        ("float.tiff", RAMP.astype(np.float32)),
        ("integers.tiff", (RAMP * 255).astype(np.int32)),
    ],
)
def test_a_ramp_of_more_than_8_bits_stays_a_ramp(tmp_path: Path, name: str, pixels: np.ndarray) -> None:
    if pixels.dtype == ">u2":
        Image.frombytes("I;16B", (64, 60), pixels.tobytes()).save(tmp_path / name)
    else:
        Image.fromarray(pixels).save(tmp_path / name)
    found = np.asarray(load_image(tmp_path / name))
    assert found.shape == (60, 64, 3)
    assert np.abs(found - np.floor(RAMP * 255.999)[..., None]).max() <= 1
    turned = Image.open(tmp_path / name)
    turned.getexif()[0x0112] = 3
    np.testing.assert_array_equal(np.asarray(load_image(turned)), found[::-1, ::-1])


def test_the_grey_of_16_bits_that_a_png_lets_shine_through_is_white(tmp_path: Path) -> None:
    pixels = np.array([[0, 700], [30000, 65535]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / "grey.png", transparency=700)
    assert np.asarray(load_image(tmp_path / "grey.png"))[..., 0].tolist() == [[0, 255], [117, 255]]


@pytest.mark.parametrize(
    "pixels",
    [np.float32([[0, 7.5]]), np.float32([[np.nan, 0]]), np.float32([[-1, 0]]), np.int32([[0, 40000]])],
    ids=str,
)
def test_pixels_of_which_nobody_can_tell_what_is_white_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"expected 0 \(black\) to (1|255) \(white\): scale them"):
        load_image(Image.fromarray(pixels))


LAYOUTS: dict[str, tuple[dict, dict]] = {  # what a LLaVA-1.5 processor says, and what ImageSpec says of it
    "exact": ({"size": {"height": 28, "width": 28}, "do_center_crop": False}, {"exact_size": (28, 28)}),
    "exact, cropped": ({"size": {"height": 31, "width": 45}}, {"exact_size": (31, 45)}),
    "exact, too small": ({"size": {"height": 31, "width": 13}}, {"exact_size": (31, 13)}),
    "larger short edge": ({"size": {"shortest_edge": 41}}, {"short_edge": 41}),
    "smaller short edge": ({"size": {"shortest_edge": 9}}, {"short_edge": 9}),
    "not resized": ({"do_resize": False}, {"resize": False}),
    "not normalised": ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
    "not rescaled": ({"do_rescale": False}, {"rescale_factor": 1.0}),
    "neither": (
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1.0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    ),
    "nearest": ({"resample": 0}, {"resample": 0}),
    "padded, larger": ({"do_pad": True, "size": {"shortest_edge": 41}}, {"mode": "pad", "short_edge": 41}),
    "padded, not resized": ({"do_pad": True, "do_resize": False}, {"mode": "pad", "resize": False}),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (7, 90), (28, 28), (29, 27), (301, 207)], ids=str)
def test_every_layout_of_a_processor_equals_the_stock_one(name: str, size: tuple[int, int]) -> None:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    processor, spec = LAYOUTS[name]
    options = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}} | processor
    image, model = noise(size), llava(28)
    expected = LlavaImageProcessorPil(**options)(image, return_tensors="np")["pixel_values"].astype(np.float32)
    image_spec_of_it = dataclasses.replace(image_spec(), **spec)
    found = make_tiles(load_image(image), model, image_spec_of_it).pixel_values
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert np.isfinite(tile_boxes(image.size, model, image_spec_of_it)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_transformers_loads_a_file(tmp_path: Path, orientation: int) -> None:
    from transformers.image_utils import load_image as stock_load

    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise((90, 60)).save(path, exif=exif, quality=95)
    expected = stock_load(str(path))
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(expected))
    with Image.open(path) as opened:
        np.testing.assert_array_equal(np.asarray(load_image(opened)), np.asarray(expected))


@pytest.mark.parametrize("case", ["llava-1.5", "llava-next"])
def test_golden_pixels_of_the_published_preprocessing(case: str) -> None:
    expected = json.loads((GOLDEN / case / "pixel_values.json").read_text())
    assert expected
    model, mode = (llava(), "pad") if case == "llava-1.5" else (llava_next(), "stock")
    for name, pixels in expected.items():
        tiles = make_tiles(load_image(GOLDEN / case / f"{name}.png"), model, image_spec(mode))
        assert list(tiles.pixel_values.shape) == pixels["shape"]
        assert hashlib.sha256(tiles.pixel_values.tobytes()).hexdigest() == pixels["sha256"]


@given(st.integers(1, 60), st.integers(1, 60))
def test_small_pictures_of_any_size_equal_the_stock_processor(width: int, height: int) -> None:
    image = noise((width, height))
    assert_same_bits(image, llava(side=14))
    assert_same_bits(image, llava(side=14), "pad")
    pinpoints = tuple((h // 24, w // 24) for h, w in PINPOINTS)
    assert_same_bits(image, llava_next(14, pinpoints))


@given(st.integers(1, 5000), st.integers(1, 5000))
@example(1008, 336)
@example(3000, 9)
@example(3, 4000)
def test_vanilla_token_order_is_that_of_pack_image_features(width: int, height: int) -> None:
    import torch
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    model = llava_next()
    pinpoints = [list(p) for p in PINPOINTS]
    grid = grid_of((width, height), model)
    side, tiles = model.tower.patches_per_side, tile_count((width, height), model)
    patches = side * side
    indices = torch.arange(tiles * patches, dtype=torch.float64).reshape(tiles, patches, 1)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=336, patch_size=14), image_grid_pinpoints=pinpoints
    )
    newline = torch.tensor([tiles * patches], dtype=torch.float64)
    packed, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [indices], [(height, width)], "default", newline
    )
    order = vanilla_token_order((width, height), grid, side)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(order, packed[0][:, 0].numpy().astype(np.int64))
    assert token_count((width, height), model, None) == len(order)


@pytest.mark.parametrize("size", [(640, 480), (336, 336), (1008, 336), (200, 1800)], ids=str)
def test_counts_are_those_of_the_tiles_made(size: tuple[int, int]) -> None:
    budget = TokenBudget(54, 10)
    for model in (llava(), llava_next()):
        tiles = len(make_tiles(noise(size), model, image_spec()).pixel_values)
        assert tile_count(size, model) == tiles
        assert token_count(size, model, budget) == tiles * 64
    assert token_count(size, llava(), None) == 576


def test_array_path_and_picture_give_the_same_pixels(tmp_path: Path) -> None:
    image = noise((120, 80))
    image.save(tmp_path / "picture.png")
    expected = np.asarray(image)
    for source in (
        image,
        expected,
        expected[:, ::-1][:, ::-1],
        tmp_path / "picture.png",
        str(tmp_path / "picture.png"),
    ):
        np.testing.assert_array_equal(np.asarray(load_image(source)), expected)


def test_unreadable_files_are_image_errors(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    noise((200, 200)).save(whole)
    data = whole.read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "damaged.png").write_bytes(data[:60] + bytes(40) + data[100:])
    for name in ("cut.png", "text.png", "empty.jpg", "damaged.png", "absent.jpg", "."):
        with pytest.raises(ImageError, match="expected") as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (30000, 9000)).save(path)  # 270 million pixels in a few kilobytes
    with pytest.raises(ImageError):
        load_image(path)
    monkeypatch.setattr(device_image, "MAX_PIXELS", 10_000)
    with pytest.raises(ImageError, match="limit"):
        load_image(Image.new("RGB", (200, 200)))
    with pytest.raises(ImageError, match="limit"):
        make_tiles(Image.new("RGB", (1, 9000)), llava(), image_spec())
    with pytest.raises(ImageError, match="limit"):
        make_tiles(Image.new("RGB", (1, 9000)), llava(), image_spec("pad"))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
    ],
    ids=lambda array: f"{array.shape}-{array.dtype}",
)
def test_arrays_that_are_no_rgb_picture_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ImageError, match="expected"):
        load_image(array)


def test_a_zero_sized_picture_is_refused() -> None:
    with pytest.raises(ImageError, match="nothing to see"):
        load_image(Image.new("RGB", (0, 5)))


def pinpoints_of(family) -> dict:
    return {} if family is llava else {"pinpoints": tuple((h // 12, w // 12) for h, w in PINPOINTS)}


def transparent_palette(size: tuple[int, int]) -> Image.Image:
    image = noise(size).quantize(16)
    image.info["transparency"] = 3
    return image


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (336, 336), (1200, 300), (90, 250)])
@pytest.mark.parametrize("mode", ["stock", "pad", "next"])
def test_boxes_are_where_the_tiles_are_from(size: tuple[int, int], mode: str) -> None:
    """A picture whose red is x and green is y, and blue full, says in its tiles where they are from."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    planes = [255 * (x + 0.5) / width, 255 * (y + 0.5) / height, np.full((height, width), 255)]
    image = Image.fromarray(np.stack(planes, axis=-1).round().astype(np.uint8))
    model, spec = (llava_next(), image_spec()) if mode == "next" else (llava(), image_spec(mode))
    tiles = make_tiles(image, model, spec).pixel_values
    boxes = tile_boxes(size, model, spec)
    assert len(boxes) == len(tiles)
    colours = (tiles * np.array(CLIP_STD)[:, None, None] + np.array(CLIP_MEAN)[:, None, None]) * 255
    centres = (np.arange(336) + 0.5) / 336
    for (left, top, right, bottom), (red, green, blue) in zip(boxes, colours, strict=True):
        inside = blue > 254.5
        assert inside.any()
        expected_x, expected_y = left + centres * (right - left), top + centres * (bottom - top)
        error_x = np.abs(red * width / 255 - expected_x)[inside]
        error_y = np.abs(green * height / 255 - expected_y[:, None])[inside]
        # Half a level of 255, and the edge of a picture, which resampling smears.
        assert np.percentile(error_x, 98) < width / 255 + 1 and np.percentile(error_y, 98) < height / 255 + 1
        beyond = (expected_x < -1) | (expected_x > width + 1) | ((expected_y < -1) | (expected_y > height + 1))[:, None]
        assert not (inside & beyond).any()
