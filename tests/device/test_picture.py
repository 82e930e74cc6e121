"""What counts as a picture: files in every form, and Pillow images that may not have read theirs yet."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.contract.junk import settle
from vz_edge.device.image import load_image
from vz_edge.device.model import EdgeModel
from vz_edge.errors import ImageError

SIZE = (120, 80)
ORIENTATION = 0x0112


def noise(size: tuple[int, int] = SIZE, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def file_of(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def half(form: str) -> bytes:
    data = file_of(noise((300, 200)), form)
    return data[: len(data) // 2]


def closed_file(path: Path) -> Image.Image:
    path.write_bytes(file_of(noise()))
    with path.open("rb") as file:
        return Image.open(file)


def broken_exif() -> Image.Image:
    image = noise()
    image.info["exif"] = b"Exif\0\0II*\0\xff\xff\xff\xff"
    return image


def broken_exif_file() -> Image.Image:
    return opened(file_of(noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"))


def test_files_in_every_form_are_the_same_picture(tmp_path: Path) -> None:
    data = file_of(noise())
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    expected = np.asarray(noise())
    with path.open("rb") as file:
        for source in (data, bytearray(data), memoryview(data), io.BytesIO(data), file, path, str(path)):
            np.testing.assert_array_equal(np.asarray(load_image(source)), expected)
        assert not file.closed


def test_a_file_that_cannot_be_rewound_is_read_from_where_it_is() -> None:
    class Socket:
        def __init__(self, data: bytes) -> None:
            self._file = io.BytesIO(data)

        def read(self, size: int = -1) -> bytes:
            return self._file.read(size)

    np.testing.assert_array_equal(np.asarray(load_image(Socket(file_of(noise())))), np.asarray(noise()))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_read_where_somebody_writes(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ImageError, match="cannot be read as a picture"):
        load_image(pipe)  # nobody does
    reader, writer = os.pipe()
    data = file_of(noise())
    thread = threading.Thread(target=lambda: os.fdopen(writer, "wb").write(data))
    thread.start()
    np.testing.assert_array_equal(np.asarray(load_image(f"/dev/fd/{reader}")), np.asarray(noise()))
    thread.join()
    os.close(reader)


WRONG: dict[str, Callable[[], object]] = {
    "half a JPEG": lambda: opened(half("JPEG")),
    "half a PNG": lambda: opened(half("PNG")),
    "half a GIF": lambda: opened(half("GIF")),
    "half a TIFF": lambda: opened(half("TIFF")),
    "half a WebP": lambda: half("WEBP"),
    "nothing to see": lambda: Image.new("RGB", (0, 5)),
    "nothing": lambda: b"",
    "text": lambda: io.BytesIO(b"not a picture"),
    "a text file": lambda: io.StringIO("not a picture"),
    "a list": lambda: [1, 2],
    "a class": lambda: Image.Image,
    "a name without letters": lambda: "",
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_what_cannot_be_read_is_an_image_error(make: Callable[[], object]) -> None:
    with pytest.raises(ImageError, match="expected"):
        load_image(make())  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_pillow_images_of_every_mode_are_answered(model: EdgeModel, mode: str) -> None:
    image = noise().convert("LA").convert("PA") if mode == "PA" else Image.new(mode, SIZE)
    assert model.ask(image, "Why?", max_new_tokens=1).answer_tokens == 1


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B", "RGBa", "La"])
def test_pillow_images_of_rare_modes_are_answered_or_refused(model: EdgeModel, mode: str) -> None:
    settle(lambda: model.ask(Image.new(mode, SIZE), "Why?", max_new_tokens=1))


def test_a_picture_whose_file_is_closed_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="expected"):
        load_image(closed_file(tmp_path / "a.png"))
    image = opened(file_of(noise()))
    image.close()
    with pytest.raises(ImageError, match="expected"):
        load_image(image)


@pytest.mark.parametrize("make", [broken_exif, broken_exif_file])
def test_broken_exif_data_say_nothing_about_the_pixels(make: Callable[[], Image.Image]) -> None:
    assert load_image(make()).size == SIZE


def test_an_animation_is_the_frame_where_it_stands() -> None:
    frames = [Image.new("RGB", SIZE, (40 * number, 0, 0)) for number in range(3)]
    animation = opened(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    animation.seek(2)
    assert load_image(animation).getpixel((0, 0)) == (80, 0, 0)


def test_a_half_received_frame_does_not_end_a_watch(model: EdgeModel, tmp_path: Path) -> None:
    frames = [noise(), opened(half("JPEG")), closed_file(tmp_path / "a.png"), half("PNG"), object(), noise()]
    with model.watch(frames, ["Why?"], max_context=200) as watch:  # type: ignore[arg-type]
        errors = [result.error for result in watch]
    assert [isinstance(error, ImageError) for error in errors] == [False, True, True, True, True, False]
