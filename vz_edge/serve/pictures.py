"""Pictures as they come in requests: out of data URLs, measured before they are decoded, decoded one request at a time.

A file of a few kilobytes can promise billions of pixels. What a picture costs is therefore read from its header when
the request comes in, and it stays a compressed file until its turn has come.
"""

from __future__ import annotations

import base64
import binascii
import io

from PIL import Image

from vz_edge.device.image import load_image
from vz_edge.errors import ImageError
from vz_edge.serve.problem import Problem

# OpenAI's list. Others of Pillow's many decoders are rarely needed and rarely attacked by their own testers.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")


def from_data_url(url: str, where: str) -> bytes:
    """The file in ``data:image/...;base64,...`` (RFC 2397). ``where`` is its place in the request. Raises Problem."""
    head, comma, data = url.partition(",")
    declared = head.lower().split(";")
    if not comma or not declared[0].startswith("data:image/") or declared[-1] != "base64":
        raise Problem(400, "invalid_image_url", f"{where} is not understood; expected data:image/...;base64,...", where)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Problem(
            400, "invalid_base64", f"{where} cannot be decoded ({error}); expected base64 without line breaks", where
        ) from error


def check_pixels(files: list[bytes], max_pixels: int, where: str) -> None:
    """Read the headers and raise Problem where one is no picture (400) or all have too many pixels (413).

    ``where`` is the request's field that they came in.
    """
    total = 0
    for number, data in enumerate(files, start=1):
        width, height = _header_size(data, f"picture {number}", max_pixels, where)
        total += width * height
        if total > max_pixels:
            raise _too_many_pixels(f"picture {number} is {width} x {height} pixels", max_pixels, where)


def decode(data: bytes) -> Image.Image:
    """The picture as 8-bit RGB, upright. Raises ImageError.

    Pillow keeps 4 bytes a pixel; a transparent picture is held four times over while it is laid over white.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return load_image(image)
    except ImageError:
        raise
    # Pillow's decoders raise whatever a broken file makes them trip over (OSError, SyntaxError, struct.error...).
    except Exception as error:
        raise ImageError(
            f"a picture of the request is broken ({error}); send it again, or as another format"
        ) from error


def _header_size(data: bytes, name: str, max_pixels: int, where: str) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(f"{name} is too large", max_pixels, where) from error
    except Exception as error:
        raise Problem(
            400,
            "invalid_image",
            f"{name} cannot be read; expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}",
            where,
        ) from error


def _too_many_pixels(what: str, max_pixels: int, where: str) -> Problem:
    return Problem(
        413,
        "image_too_large",
        f"{what}, and a request may have {max_pixels} in all its pictures; scale them down",
        where,
    )
