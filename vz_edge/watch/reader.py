"""The thread that reads a source, and the one place where a frame waits to be taken.

Of a live source the newest frame waits: what it replaces is dropped. A recorded source waits itself until its frame
was taken. Every frame that was read is in the end either taken or dropped, and counted as such.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from vz_edge.errors import RequestError, SourceError, VzEdgeError
from vz_edge.metrics import Counter
from vz_edge.watch.frame import Frame
from vz_edge.watch.source import Source

Clock = Callable[[], float]
# Stamps of a day's clock are exact to 0.24 us as floats; a frame that is just due must not be passed over for that.
STAMP_ERROR_SEC = 1e-6
LONGEST_WAIT_SEC = 3600.0  # then it is looked at the clock again; a lock waits no longer than threading.TIMEOUT_MAX

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Reading:
    """A frame, its number among those that were read, and when it was: ``time.time`` and ``time.monotonic``."""

    frame: Frame
    number: int
    wall_sec: float
    monotonic_sec: float


@dataclass(frozen=True, eq=False)
class Taken:
    """A frame that was the newest at ``monotonic_sec``; ``dropped`` were passed over since the one taken before."""

    reading: Reading
    dropped: int
    monotonic_sec: float


@dataclass(frozen=True)
class Counters:
    """Frames: ``read`` is the sum of ``taken``, ``dropped`` and at most one that waits."""

    read: Counter
    taken: Counter
    dropped: Counter


class Slot:
    """Holds at most one frame, which a reader puts and a consumer takes.

    ``waits`` says that a frame is never replaced: ``put`` waits until the one before was taken.
    """

    def __init__(self, waits: bool, counters: Counters, clock: Clock = time.monotonic) -> None:
        self._waits = waits
        self._counters = counters
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: Reading | None = None
        self._read = 0
        self._dropped = 0  # since the last frame that was taken
        self._moved = math.inf  # when a frame last came or went, or the source was opened
        self._ended = False
        self._error: BaseException | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def begin(self) -> None:
        """The source is being opened: from now on it can be late."""
        with self._changed:
            self._moved = self._clock()
            self._changed.notify_all()

    def put(self, frame: Frame) -> bool:
        """Let a frame wait to be taken; False where no more are wanted."""
        with self._changed:
            if not self._room():
                return False
            if self._waiting is not None:
                self._count_drop()
            self._waiting = self._reading(frame)
            self._changed.notify_all()
            return True

    def skip(self, frame: Frame) -> bool:
        """Count a frame as read and dropped; False where no more are wanted."""
        with self._changed:
            if not self._room():
                return False
            self._reading(frame)
            self._count_drop()
            return True

    def end(self, error: BaseException | None) -> None:
        """No frame comes after those that were put: the source is at its end, or failed."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """No more frames are wanted: whoever waits goes on, and a frame that waits is dropped."""
        with self._changed:
            self._closed = True
            if self._waiting is not None:
                self._waiting = None
                self._count_drop()
            self._changed.notify_all()

    def pause(self, until: float) -> None:
        """Wait until the clock says ``until``, or less where no more frames are wanted."""
        with self._changed:
            while not self._closed and (left := until - self._clock()) > 0:
                self._changed.wait(min(left, LONGEST_WAIT_SEC))

    def wait(self, stalled_after: float | None) -> None:
        """Return when ``take`` would not wait. Raises SourceError where no frame came for ``stalled_after`` seconds."""
        with self._changed:
            while self._waiting is None and not self._ended and not self._closed:
                left = math.inf if stalled_after is None else self._moved + stalled_after - self._clock()
                if left <= 0:
                    raise SourceError(
                        f"the source gave no frame for {stalled_after:g} s; check the camera, or raise stalled_after"
                    )
                self._changed.wait(None if left == math.inf else min(left, LONGEST_WAIT_SEC))

    def take(self, stalled_after: float | None) -> Taken | None:
        """The frame that waits, or else the next one; None at the end.

        Raises SourceError where the source failed, had no frame at all, or none for ``stalled_after`` seconds.
        """
        with self._changed:
            self.wait(stalled_after)
            if self._waiting is None:
                if not self._closed:
                    self._raise_failure()
                return None
            self._moved = self._clock()
            taken = Taken(self._waiting, self._dropped, self._moved)
            self._waiting, self._dropped = None, 0
            self._counters.taken.add()
            self._changed.notify_all()
            return taken

    def _room(self) -> bool:
        """Wait until a frame may come; False where no more are wanted."""
        if self._waits:
            self._changed.wait_for(lambda: self._closed or self._waiting is None)
        return not self._closed

    def _reading(self, frame: Frame) -> Reading:
        number, self._read = self._read, self._read + 1
        self._moved = self._clock()
        self._counters.read.add()
        return Reading(frame, number, time.time(), self._moved)

    def _count_drop(self) -> None:
        self._dropped += 1
        self._counters.dropped.add()

    def _raise_failure(self) -> None:
        error, self._error = self._error, None
        if isinstance(error, VzEdgeError):
            raise error
        if error is not None:
            raise SourceError(
                f"the source failed after {self._read} frames ({type(error).__name__}: {error}); expected a frame or "
                "the end: watch it anew"
            ) from error
        if self._read == 0:
            raise SourceError("the source has no frames; expected at least one")


def read(source: Source, slot: Slot, every: float | None, clock: Clock = time.monotonic) -> None:
    """Put the frames of ``source`` into ``slot`` until either ends: the body of the reader's thread.

    Of a recorded source, frames whose stamps lie less than ``every`` seconds from the last one's are passed over. Those
    without stamps, as the pictures of a folder, are all put, which a warning of the log says.
    """
    error: BaseException | None = None
    slot.begin()
    logger.info("opening the source of frames")
    try:
        with closing(source.frames()) as frames:
            started_at = last_stamp = None
            warned = False
            for frame in frames:
                if source.delivery == "replayed":
                    stamp = _stamp_of(frame, "realtime=True")
                    started_at = clock() - stamp if started_at is None else started_at
                    slot.pause(until=started_at + stamp)
                too_soon = False
                if source.delivery == "recorded" and every is not None and frame.stamp_sec is None:
                    if not warned:
                        logger.warning("every=%g passes over none of these frames, which have no time stamps", every)
                    warned = True
                elif source.delivery == "recorded" and every is not None:
                    stamp = _stamp_of(frame, f"every={every:g}")
                    too_soon = last_stamp is not None and abs(stamp - last_stamp) < every - STAMP_ERROR_SEC
                    last_stamp = last_stamp if too_soon else stamp
                if not (slot.skip(frame) if too_soon else slot.put(frame)):
                    break
    except BaseException as failure:  # whatever it is: a consumer that was not told would wait for ever
        error = failure
    finally:
        slot.end(error)


def _stamp_of(frame: Frame, option: str) -> float:
    if frame.stamp_sec is None:
        raise RequestError(f"{option} needs frames with time stamps, and this source has none; leave it out")
    return frame.stamp_sec
