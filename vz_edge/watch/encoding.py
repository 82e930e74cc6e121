"""Pictures as robot middleware sends them: bytes and the name of their encoding."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import Image

from vz_edge.device.image import ImageSource
from vz_edge.errors import ImageError
from vz_edge.watch.frame import Color, Frame

# Of sensor_msgs/image_encodings.h, whose names dora's nodes use too; the others are depth, Bayer and YUV.
ENCODINGS: dict[str, Color] = {"rgb8": "rgb", "bgr8": "bgr", "mono8": "gray"}
NANOSECONDS = 10**9


def unpack(data: Any, encoding: str, height: int, width: int, step: int | None = None) -> np.ndarray:
    """Pixels, uint8 [height, width] or [height, width, 3], out of a buffer of bytes whose rows have ``step`` of them.

    Rows may end in padding; None says that they do not. Raises ImageError.
    """
    if encoding not in ENCODINGS:
        raise ImageError(f"a message has encoding {encoding}; expected {', '.join(ENCODINGS)}, or a compressed picture")
    channels = 1 if encoding == "mono8" else 3
    step = width * channels if step is None else step
    pixels = np.frombuffer(data, np.uint8)
    if step < width * channels or pixels.size != height * step:
        raise ImageError(
            f"a message says {width} x {height} pixels of {encoding} in rows of {step} bytes and holds "
            f"{pixels.size} bytes; expected {height * step}"
        )
    rows = pixels.reshape(height, step)[:, : width * channels]
    return rows if channels == 1 else rows.reshape(height, width, channels)


def decompress(data: Any, encoding: str) -> Image.Image:
    """The picture in a file's bytes; ``encoding`` is for the error alone, since the file says it. Raises ImageError."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    # Pillow's decoders raise whatever a broken file makes them trip over (OSError, SyntaxError, struct.error...).
    except Exception as error:
        raise ImageError(f"a message of format {encoding!r} cannot be read ({error}); expected JPEG or PNG") from error
    return image


def ros_frame(message: Any, received_sec: float) -> Frame:
    """The frame in a ``sensor_msgs/Image`` or ``CompressedImage``, of rosbags or of rclpy.

    Its stamp is the header's or, where that is 0, ``received_sec``. What is wrong with the picture is raised when the
    frame is answered.
    """
    stamp_sec = message.header.stamp.sec + message.header.stamp.nanosec / NANOSECONDS
    color = ENCODINGS.get(getattr(message, "encoding", ""), "rgb")
    return Frame(functools.partial(_ros_picture, message), color, stamp_sec or received_sec)


def _ros_picture(message: Any) -> ImageSource:
    if hasattr(message, "encoding"):  # a CompressedImage has a format instead
        return unpack(message.data, message.encoding, message.height, message.width, message.step)
    return decompress(message.data, message.format)
