"""Pictures in requests: bombs are refused by their headers, broken files are errors of the tree."""

from __future__ import annotations

import contextlib
import tracemalloc
import warnings

import numpy as np
import pytest
from PIL import Image

from benchmarks.malformed import png_bomb
from tests.serve.asking import file_of, picture
from vz_edge.errors import ImageError
from vz_edge.serve.pictures import FORMATS, check_pixels, decode
from vz_edge.serve.problem import Problem


@pytest.mark.parametrize("side", [6000, 30_000, 2**31 - 1])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    bomb = png_bomb(side)
    tracemalloc.start()
    try:
        with pytest.raises(Problem) as raised:
            check_pixels([bomb], 25_000_000, "messages")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (raised.value.status_code, raised.value.body.error.code) == (413, "image_too_large")
    assert peak_bytes < 1_000_000


def test_pixels_are_counted_together() -> None:
    file = file_of(picture(1, (40, 30)))
    check_pixels([file, file], 2400, "messages")
    with pytest.raises(Problem, match="picture 2 is 40 x 30"):
        check_pixels([file, file], 2399, "messages")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read(form: str) -> None:
    file = file_of(picture(2), form)
    check_pixels([file], 1200, "messages")
    assert (decode(file).size, decode(file).mode) == ((40, 30), "RGB")


@pytest.mark.parametrize("form", ["TIFF", "BMP", "EPS", "ICO"])
def test_other_formats_are_not(form: str) -> None:
    with pytest.raises(Problem, match="cannot be read; expected JPEG"):
        check_pixels([file_of(picture(3), form)], 10_000, "messages")


def test_transparency_and_orientation_are_seen_to() -> None:
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(file_of(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(file_of(picture(4), "JPEG", exif=exif)).size == (30, 40)


def test_a_broken_file_is_an_image_error() -> None:
    whole = file_of(picture(5, (200, 200)))
    broken = whole[: len(whole) // 2]
    check_pixels([broken], 40_000, "messages")
    with pytest.raises(ImageError, match="broken"):
        decode(broken)
    with pytest.raises(ImageError):
        decode(png_bomb(500))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_read_or_refused(form: str) -> None:
    rng, exif = np.random.default_rng(1), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    good = exif.tobytes()
    for _ in range(60):
        broken = bytearray(good[: rng.integers(1, len(good) + 1)])
        for place in rng.integers(0, len(broken), 3):
            broken[place] = rng.integers(256)
        file = file_of(picture(5), form, exif=bytes(broken))
        with contextlib.suppress(ImageError, Problem), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_pixels([file], 10_000, "messages")
            assert decode(file).mode == "RGB"
