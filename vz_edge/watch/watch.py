"""Watch: a stream of frames, questions about the newest of them, and a stream of results."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from vz_edge.arguments import number, shown
from vz_edge.errors import RequestError
from vz_edge.metrics import Metrics
from vz_edge.watch.engine import NO_QUESTIONS, Cancelled, Engine, Question
from vz_edge.watch.reader import Clock, Reading, Slot, read
from vz_edge.watch.result import Result
from vz_edge.watch.source import Source
from vz_edge.watch.watch_metrics import WatchMetrics

if TYPE_CHECKING:
    from vz_edge.device.model import EdgeModel
    from vz_edge.watch.background import Background

# A camera's next frame comes sooner; a source that blocks for longer is left behind with a warning.
CLOSE_SEC = 5.0
MISSES_TO_WARN = 10
POSITIVE = "a number above 0, or none"


def check_positive(**settings: object) -> None:
    """Raise RequestError for the first of a watch's settings that is given and not a number above 0."""
    for name, value in settings.items():
        if value is not None and not number(name, value, POSITIVE) > 0:
            raise RequestError(f"{name} {shown(value)} is impossible; expected {POSITIVE}")


class Watch(Iterator[Result], AsyncIterator[Result]):
    """Results as they come: ``for``, ``async for`` or ``background``. Made by ``EdgeModel.watch``.

    A source is read in a thread of its own from the first result on; answers are made where results are asked for.
    Leave it by ``with``, ``async with`` or ``close``: they end an answer that is being written, wait for the thread
    and so release the camera.
    """

    def __init__(
        self,
        model: EdgeModel,
        source: Source,
        questions: str | Sequence[Question],
        *,
        every: float | None = None,
        deadline: float | None = None,
        unchanged_below: float | None = None,
        stalled_after: float | None = None,
        tokens: int | None = None,
        system: str | None = None,
        max_context: int | None = None,
        metrics: Metrics | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """As ``EdgeModel.watch``, which is the way to make one."""
        check_positive(every=every, deadline=deadline, unchanged_below=unchanged_below, stalled_after=stalled_after)
        if metrics is not None and not isinstance(metrics, Metrics):
            raise RequestError(f"metrics {shown(metrics)} is no registry; expected vz_edge.metrics.Metrics, or none")
        self.metrics = metrics or Metrics()
        self._counted = WatchMetrics(self.metrics)
        self._slot = slot = Slot(source.delivery == "recorded", self._counted.frames, clock)
        self._engine = Engine(
            model,
            model.session(system, max_context),
            questions,
            tokens,
            deadline,
            unchanged_below,
            lambda: slot.closed,
            clock,
        )
        if not self._engine.question_count:
            raise RequestError(NO_QUESTIONS)
        # Neither the thread nor the slot knows the watch: one that is forgotten is collected, and its reader ends.
        self._reader = threading.Thread(
            target=read, args=(source, slot, every, clock), name="vz-edge-watch", daemon=True
        )
        weakref.finalize(self, slot.close)
        self._every = None if source.delivery == "recorded" else every
        self._stalled_after = stalled_after
        self._next_take = -math.inf
        self._misses = 0  # in succession
        self._turn = threading.RLock()

    def __next__(self) -> Result:
        """The result of the newest frame; waits for it.

        Raises SourceError where the source cannot be opened, has no frames, fails or stalls, and DependencyError.
        """
        with self._turn:
            try:
                result = self._answer_next()
            except BaseException:
                self._slot.close()  # the reader ends with its next frame; ``close`` waits for that
                raise
            if result is None:
                self.close()
                raise StopIteration
            self._counted.observe(result)
            self._warn_of_misses(result)
            return result

    def _answer_next(self) -> Result | None:
        if not self._slot.closed and self._reader.ident is None:
            self._reader.start()
        if self._every is not None:
            self._slot.pause(self._next_take)
        self._slot.wait(self._stalled_after)
        with self._engine.turn():  # a frame is taken when work on it can begin: it is the newest then
            taken = self._slot.take(self._stalled_after)
            if taken is None:
                return None
            if self._every is not None:
                self._next_take = taken.monotonic_sec + self._every
            try:
                return self._engine.answer(taken)
            except Cancelled:
                return None

    def ask(self, reading: Reading, questions: Sequence[Question]) -> Result:
        """Answer questions of the moment about a frame of this watch, from any thread, in the watch's own session.

        They wait for the frame that is being answered and go before the next one. A frame that was looked at for them
        is not looked at again when its turn comes, and the other way round. Raises RequestError, also where the watch
        was closed.
        """
        try:
            with self._engine.turn(of_the_moment=True):
                return self._engine.ask(reading, questions)
        except Cancelled:
            raise RequestError("the watch was closed before the answer; watch anew and ask again") from None

    def close(self) -> None:
        """End the watch: an answer that is being written ends with its next piece of text, the source is released.

        A source that gives no frame cannot be interrupted: after 5 s a RuntimeWarning says that it was left behind.
        """
        self._slot.close()
        with self._turn:
            if self._reader.is_alive():
                self._reader.join(CLOSE_SEC)
            if self._reader.is_alive():
                warnings.warn(
                    f"the source of a watch has not given a frame for {CLOSE_SEC:g} s, so its thread could not be "
                    "ended; it ends with the next frame, or with the program",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def __repr__(self) -> str:
        return f"<Watch: {self._engine.question_count} question(s){', closed' if self._slot.closed else ''}>"

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Result:
        """As ``__next__``, in a thread of asyncio's. A task that is cancelled here ends the watch."""
        try:
            result = await asyncio.to_thread(next, self, None)
        except asyncio.CancelledError:
            self._slot.close()
            raise
        if result is None:
            raise StopAsyncIteration
        return result

    async def aclose(self) -> None:
        """As ``close``."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> Watch:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def background(self, on_result: Callable[[Result], object]) -> Background:
        """Watch in a thread of its own, which calls ``on_result`` with each result."""
        from vz_edge.watch.background import Background

        return Background(self, on_result)

    def _warn_of_misses(self, result: Result) -> None:
        self._misses = self._misses + 1 if result.deadline_missed else 0
        if self._misses == MISSES_TO_WARN:
            warnings.warn(
                f"{MISSES_TO_WARN} frames in succession missed their deadline (the last took "
                f"{result.timings.total_sec:.3g} s); give them more, ask less, or export with fewer tokens",
                RuntimeWarning,
                stacklevel=3,
            )
