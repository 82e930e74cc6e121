"""A frame as a source gives it, and the pixels that are in it.

Pictures are converted when a frame is answered, not when it is read: of a camera's frames most are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vz_edge.arguments import one_of, shown
from vz_edge.device.image import ImageSource
from vz_edge.errors import ImageError, VzEdgeError

Color = Literal["rgb", "bgr", "gray"]
COLORS: tuple[Color, ...] = ("rgb", "bgr", "gray")


@dataclass(frozen=True, eq=False, repr=False)
class Frame:
    """One picture of a stream.

    ``picture`` is what ``EdgeModel.ask`` takes, an array as ``color`` says, or a function that makes either and is
    called only if the frame is answered. An array is uint8 or float in 0..1, [height, width, 3] or, for "gray",
    [height, width] or [height, width, 1]; it must not be written to after it was given. ``stamp_sec`` is the time of
    the frame by its source's own clock; ``id`` is its number in the stream by default.
    """

    picture: ImageSource | Callable[[], ImageSource]
    color: Color = "rgb"
    stamp_sec: float | None = None
    id: str | int | None = None

    def __repr__(self) -> str:
        picture = self.picture
        what = f"{picture.dtype}{list(picture.shape)}" if isinstance(picture, np.ndarray) else shown(picture)
        return f"Frame({what}, {self.color!r}, stamp_sec={self.stamp_sec}, id={self.id!r})"


def picture_of(frame: Frame) -> ImageSource:
    """The frame's picture as ``EdgeModel.ask`` takes it. Raises ImageError."""
    one_of("the color of a frame", frame.color, COLORS)
    picture = _made(frame.picture) if callable(frame.picture) else frame.picture
    return _rgb(picture, frame.color) if isinstance(picture, np.ndarray) else picture


def _made(make: Callable[[], ImageSource]) -> ImageSource:
    try:
        return make()
    except VzEdgeError:
        raise
    except Exception as error:  # of the source's own code, about this frame: the next one may be whole
        raise ImageError(
            f"the frame's picture could not be made ({type(error).__name__}: {error}); expected one, or an ImageError"
        ) from error


def _rgb(array: np.ndarray, color: Color) -> np.ndarray:
    """uint8 [height, width, 3], RGB."""
    shape = array.shape[:2] if color == "gray" and array.ndim == 3 and array.shape[2] == 1 else array.shape
    if len(shape) != (2 if color == "gray" else 3) or (color != "gray" and shape[2] != 3):
        expected = "[height, width]" if color == "gray" else "[height, width, 3]"
        raise ImageError(
            f"a frame that is said to be {color} has shape {array.shape}; expected {expected}: name its color"
        )
    pixels = _bytes(array).reshape(shape)
    if color == "gray":
        return np.repeat(pixels[..., None], 3, axis=2)
    return pixels[..., ::-1] if color == "bgr" else pixels


def _bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"a frame has dtype {array.dtype}; expected uint8, or float in 0..1")
    if not np.isfinite(array).all():
        count = np.count_nonzero(~np.isfinite(array))
        raise ImageError(f"{count} values of a float frame are NaN or infinite; expected 0..1")
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        raise ImageError(
            f"a float frame has values from {array.min():g} to {array.max():g}; expected 0..1: scale it, or give uint8"
        )
    pixels: np.ndarray = np.rint(array * 255).astype(np.uint8)
    return pixels
