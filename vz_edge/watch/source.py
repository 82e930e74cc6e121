"""Where frames come from: what a source has to do, and which one a caller means.

A source is "live" (frames come whether or not anyone is ready: the newest counts, older ones are dropped),
"recorded" (it waits: every frame counts) or "replayed" (a recording that is played at its own pace, as if live).
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np

from vz_edge.arguments import one_of
from vz_edge.device.image import ImageSource
from vz_edge.errors import RequestError
from vz_edge.watch.bag import BagSource, is_bag
from vz_edge.watch.folder import FolderSource
from vz_edge.watch.frame import COLORS, Color, Frame
from vz_edge.watch.video import VideoSource

Delivery = Literal["live", "recorded", "replayed"]


class Source(Protocol):
    """What gives frames. ``frames`` is called once, and used and closed in one thread, which is not the caller's."""

    @property
    def delivery(self) -> Delivery:
        """Whether frames wait for the model; those of a "replayed" source have time stamps."""

    def frames(self) -> Generator[Frame, None, None]:
        """The frames; what was opened for them is given back when the generator ends or is closed.

        Raises SourceError or DependencyError.
        """


# What can be iterated over and is no stream of pictures: letters, bytes, rows, names.
NO_FRAMES = (str, bytes, bytearray, memoryview, np.ndarray, Mapping)
AnySource = Source | Iterable[Frame | ImageSource] | str | Path | int


class IteratorSource:
    """Any iterable of frames, or of pictures as ``EdgeModel.ask`` takes them; arrays are as ``color`` says."""

    def __init__(
        self, frames: Iterable[Frame | ImageSource], color: Color = "rgb", delivery: Delivery = "live"
    ) -> None:
        self.delivery = delivery
        self._frames = frames
        self._color = color

    def frames(self) -> Generator[Frame, None, None]:
        """As Source.frames; closes the iterator if it can be closed."""
        with ExitStack() as stack:
            pictures = iter(self._frames)
            if hasattr(pictures, "close"):
                stack.callback(pictures.close)
            for picture in pictures:
                yield picture if isinstance(picture, Frame) else Frame(picture, self._color)


def open_source(source: AnySource, color: Color = "rgb") -> Source:
    """The source that is meant: a number is a camera; a path or string a folder, a bag, a video or a stream.

    A list or tuple is recorded, since it is all there; other iterables are live. ``color`` is for arrays of an
    iterable, the other sources know theirs. Nothing is opened yet. Raises RequestError.
    """
    one_of("color", color, COLORS)
    own = cast(Source, source) if hasattr(source, "frames") and hasattr(source, "delivery") else None
    if own is None and isinstance(source, Iterable) and not isinstance(source, NO_FRAMES):
        return IteratorSource(source, color, "recorded" if isinstance(source, (list, tuple)) else "live")
    if color != "rgb":
        raise RequestError(f"color={color!r} is for arrays of an iterable; this source knows its own, leave color out")
    if own is not None:
        return own
    if isinstance(source, int) and not isinstance(source, bool):
        return VideoSource(source)
    if isinstance(source, (str, Path)):
        if is_bag(Path(source)):
            return BagSource(source)
        return FolderSource(source) if os.path.isdir(source) else VideoSource(source)
    raise RequestError(
        f"a {type(source).__name__} is no source of frames; expected an iterable of pictures, a camera's number, a "
        "path, a stream's address, or a source of vz_edge.watch"
    )
