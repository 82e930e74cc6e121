"""A camera whose frames come when a test says so."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

END = object()
PATIENCE_SEC = 10  # how long a test waits for a thread before it fails


class Camera:
    """An iterable of what ``give`` is given. An exception that is given is raised, END ends it."""

    def __init__(self, *first: Any) -> None:
        self._given: queue.Queue[Any] = queue.Queue()
        self._changed = threading.Condition()
        self._count = self._read = 0
        self.released = False
        self.queue(*first)

    def queue(self, *frames: Any) -> None:
        """Let frames come as soon as they are read."""
        for frame in frames:
            self._count += 1
            self._given.put(frame)

    def give(self, *frames: Any) -> None:
        """Let frames come, and return when the last of them can be taken."""
        self.queue(*frames)
        with self._changed:
            assert self._changed.wait_for(lambda: self._read == self._count or self.released, PATIENCE_SEC)

    def __iter__(self) -> Iterator[Any]:
        try:
            while (frame := self._given.get()) is not END:
                if isinstance(frame, Exception):
                    raise frame
                yield frame
                with self._changed:  # whoever asks for the next frame has put this one where it can be taken
                    self._read += 1
                    self._changed.notify_all()
        finally:
            with self._changed:
                self.released = True
                self._changed.notify_all()


def picture(seed: int, size: tuple[int, int] = (40, 50)) -> np.ndarray:
    """A picture of noise: uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
