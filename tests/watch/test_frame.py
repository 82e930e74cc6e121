"""What a caller says about a frame's pixels is checked, and nothing is guessed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from vz_edge.device.image import load_image
from vz_edge.errors import ImageError
from vz_edge.watch.frame import Color, Frame, picture_of

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
SHAPES = arrays.array_shapes(min_dims=1, max_dims=4, max_side=4)
DTYPES = st.sampled_from(["uint8", "bool", "int16", "uint16", "float16", "float32", "float64"])


def pixels(frame: Frame) -> np.ndarray:
    return np.asarray(load_image(picture_of(frame)))


@pytest.mark.parametrize(
    ("array", "color"),
    [
        (RGB, "rgb"),
        (RGB[..., ::-1], "bgr"),
        (np.float32(RGB) / 255, "rgb"),
        (np.float64(RGB) / 255, "rgb"),
    ],
)
def test_colours_and_floats_come_out_as_the_same_picture(array: np.ndarray, color: Color) -> None:
    assert np.array_equal(pixels(Frame(array, color)), RGB)


@pytest.mark.parametrize("array", [RGB[..., 0], RGB[..., :1], RGB[..., 0].astype(np.float32) / 255])
def test_grey_has_three_equal_channels(array: np.ndarray) -> None:
    assert np.array_equal(pixels(Frame(array, "gray")), RGB[..., [0, 0, 0]])


def test_a_function_makes_the_picture_when_it_is_asked_for() -> None:
    assert np.array_equal(pixels(Frame(lambda: RGB[..., ::-1], "bgr")), RGB)
    image = Image.fromarray(RGB)
    assert picture_of(Frame(image, "rgb")) is image


def spoilt(value: float) -> np.ndarray:
    array = RGB / 255
    array[2, 3, 1] = value
    return array


@pytest.mark.parametrize(
    ("array", "color", "found"),
    [
        (spoilt(np.nan), "rgb", "1 values of a float frame are NaN"),
        (spoilt(np.inf), "rgb", "1 values of a float frame are NaN or infinite"),
        (RGB.astype(np.float32), "rgb", "values from 0 to 248"),
        (spoilt(-0.25), "rgb", r"from -0.25 to"),
        (RGB.astype(np.int16), "rgb", "dtype int16"),
        (RGB > 9, "rgb", "dtype bool"),
        (RGB[..., 0], "bgr", r"said to be bgr has shape \(5, 7\)"),
        (RGB, "gray", r"said to be gray has shape \(5, 7, 3\); expected \[height, width\]"),
        (RGB[..., :2], "rgb", r"shape \(5, 7, 2\)"),
        (RGB[None], "rgb", r"shape \(1, 5, 7, 3\)"),
    ],
)
def test_what_is_wrong_is_named(array: np.ndarray, color: Color, found: str) -> None:
    with pytest.raises(ImageError, match=found) as raised:
        picture_of(Frame(array, color))
    assert "expected" in str(raised.value) and "\n" not in str(raised.value)


@settings(max_examples=50, deadline=None)
@given(st.data(), DTYPES, SHAPES, st.sampled_from(["rgb", "bgr", "gray"]))
def test_any_array_is_a_picture_or_an_image_error(
    data: st.DataObject, dtype: str, shape: tuple[int, ...], color: Color
) -> None:
    array = data.draw(arrays.arrays(dtype, shape))
    try:
        picture = picture_of(Frame(array, color))
    except ImageError:
        return
    assert isinstance(picture, np.ndarray)
    assert picture.dtype == np.uint8 and picture.shape == (*array.shape[:2], 3)
