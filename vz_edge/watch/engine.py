"""The answers about one frame: gate, picture, questions, and a deadline that is looked at between all of them."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from vz_edge.arguments import shown
from vz_edge.device.image import Tiles
from vz_edge.device.model import EdgeModel
from vz_edge.device.options import AskOptions
from vz_edge.device.reply import Reply
from vz_edge.device.session import Session
from vz_edge.device.vision import VisionResult
from vz_edge.errors import RequestError, VzEdgeError
from vz_edge.watch.frame import Frame, picture_of
from vz_edge.watch.gate import change
from vz_edge.watch.reader import Clock, Taken
from vz_edge.watch.result import Result, Timings

Question = str | tuple[str, AskOptions]


class Cancelled(Exception):  # noqa: N818 - what was asked for, no error
    """The watch was closed in the middle of a frame."""


@dataclass
class _Seen:
    """The picture that questions are about: its tiles, what the vision graph made of it, and what was said about it."""

    tiles: Tiles
    picture: VisionResult
    in_cache: bool = False  # whether the session has read it
    replies: dict[int, Reply] = field(default_factory=dict)  # by question; those that asking again would give again


class Engine:
    """Answers the same questions about one frame after another, in one session. For one thread at a time."""

    def __init__(
        self,
        model: EdgeModel,
        session: Session,
        questions: str | Sequence[Question],
        tokens: int | None,
        deadline: float | None,
        unchanged_below: float | None,
        cancelled: Callable[[], bool],
        clock: Clock = time.monotonic,
    ) -> None:
        """``cancelled`` is asked between pieces of text; the rest is as in ``EdgeModel.watch``.

        Raises RequestError and BudgetError.
        """
        self._questions = checked_questions(questions)
        for question, options in self._questions:
            model.stream(None, question, **options)  # raises what is wrong with it, and begins nothing
        self._model = model
        self._budget = model.manifest.budget_of(tokens)
        self._session = session
        self._deadline = deadline
        self._unchanged_below = unchanged_below
        self._cancelled = cancelled
        self._clock = clock
        self._seen: _Seen | None = None

    @property
    def question_count(self) -> int:
        """How many questions are asked about each frame."""
        return len(self._questions)

    def answer(self, taken: Taken) -> Result:
        """The result of a frame; this package's errors are in it.

        Raises Cancelled, RequestError where the model was closed, and others.
        """
        self._model.check_open()
        reading, frame = taken.reading, taken.reading.frame
        due = math.inf if self._deadline is None else taken.monotonic_sec + self._deadline
        seconds: defaultdict[str, float] = defaultdict(float)
        replies: list[Reply | None] = [None] * len(self._questions)
        changed, errors = True, list[VzEdgeError]()
        try:
            seen = self._look(frame, seconds)
        except VzEdgeError as error:
            errors.append(error)
        else:
            changed, self._seen = seen is not self._seen, seen
            replies, errors = self._ask_all(seen, due, seconds)
        ready = self._clock()
        return Result(
            frame_id=reading.number if frame.id is None else frame.id,
            stamp_sec=frame.stamp_sec,
            captured_at=reading.wall_sec,
            captured_monotonic_sec=reading.monotonic_sec,
            age_sec=taken.monotonic_sec - reading.monotonic_sec,
            latency_sec=ready - reading.monotonic_sec,
            dropped=taken.dropped,
            changed=changed,
            replies=tuple(replies),
            deadline_missed=ready > due or any(map(_cut_short, replies)) or (None in replies and not errors),
            error=errors[0] if errors else None,
            timings=Timings(**seconds, total_sec=ready - taken.monotonic_sec),
        )

    def _look(self, frame: Frame, seconds: defaultdict[str, float]) -> _Seen:
        """The picture to ask about: this frame's or, where that is as good as the same, the one before."""
        with _timed(seconds, "preprocess_sec"):
            tiles = self._model.vision.tile(picture_of(frame))
            if self._seen is not None and self._unchanged_below is not None:
                manifest = self._model.manifest
                difference = change(self._seen.tiles, tiles, manifest.image, manifest.model.tower.patch_size)
                if difference < self._unchanged_below:
                    return self._seen
        with _timed(seconds, "vision_sec"):
            return _Seen(tiles, self._model.vision.encode(tiles, self._budget))

    def _ask_all(
        self, seen: _Seen, due: float, seconds: defaultdict[str, float]
    ) -> tuple[list[Reply | None], list[VzEdgeError]]:
        replies, errors = list[Reply | None](), list[VzEdgeError]()
        for index in range(len(self._questions)):
            try:
                replies.append(self._reply(seen, index, due, seconds))
            except VzEdgeError as error:  # this question's; the others may still be answered
                replies.append(None)
                errors.append(error)
        return replies, errors

    def _reply(self, seen: _Seen, index: int, due: float, seconds: defaultdict[str, float]) -> Reply | None:
        """The answer to a question, or None where its time is over before it is begun."""
        if index in seen.replies:
            return seen.replies[index]
        if self._cancelled():
            raise Cancelled
        if not seen.in_cache and self._clock() < due:
            seconds["prefill_sec"] += self._session.look(seen.picture).prefill_sec
            seen.in_cache = True
        left = due - self._clock()
        if left <= 0:
            return None
        question, options = self._questions[index]
        reply = self._ask(question, options, left)
        seconds["prefill_sec"] += reply.prefill_sec
        seconds["decode_sec"] += reply.decode_sec
        greedy_or_seeded = not options.get("temperature") or options.get("seed") is not None
        if greedy_or_seeded and not _cut_short(reply):
            seen.replies[index] = reply
        return reply

    def _ask(self, question: str, options: AskOptions, left_sec: float) -> Reply:
        if left_sec < math.inf:
            options = options.copy()
            options["deadline_sec"] = min(left_sec, options.get("deadline_sec") or math.inf)
        stream = self._session.stream(question, **options)
        for _ in stream:
            if self._cancelled():
                stream.close()
                raise Cancelled
        return stream.reply


def checked_questions(questions: str | Sequence[Question]) -> list[tuple[str, AskOptions]]:
    """Questions with their options, each at least as a pair; a string is one question. Raises RequestError."""
    asked = [questions] if isinstance(questions, str) else questions
    if not isinstance(asked, (list, tuple)):
        raise RequestError(f"questions {shown(questions)} are not understood; expected a question, or a list of them")
    if not asked:
        raise RequestError("there are no questions; expected at least one")
    return [_pair(question) for question in asked]


def _pair(question: object) -> tuple[str, AskOptions]:
    if isinstance(question, str):
        return question, AskOptions()
    words, options = question if isinstance(question, (list, tuple)) and len(question) == 2 else (None, None)
    if not isinstance(words, str) or not isinstance(options, Mapping):
        raise RequestError(
            f"the question {shown(question)} is not understood; expected a string, or a string and its options as in "
            "('Is the door open?', {'max_new_tokens': 5})"
        )
    return words, cast(AskOptions, dict(options))


def _cut_short(reply: Reply | None) -> bool:
    return reply is not None and reply.finish_reason == "deadline"


@contextmanager
def _timed(seconds: defaultdict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - started
