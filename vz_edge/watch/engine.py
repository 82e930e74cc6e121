"""The answers about one frame: gate, picture, questions, and a deadline that is looked at between all of them."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from vz_edge.watch.reader import Clock, Reading, Taken
from vz_edge.watch.result import Result, Timings
from vz_edge.watch.turns import Turns

Question = str | tuple[str, AskOptions]
NO_QUESTIONS = "there are no questions; expected at least one"


class Cancelled(Exception):  # noqa: N818 - what was asked for, no error
    """The watch was closed in the middle of a frame."""


@dataclass
class _Seen:
    """The picture that questions are about: its tiles, what the vision graph made of it, and what was said about it."""

    frame: Frame
    tiles: Tiles
    picture: VisionResult
    in_cache: bool = False  # whether the session has read it
    answered: bool = False  # whether there is a result of ``answer`` about it
    replies: dict[int, Reply] = field(default_factory=dict)  # by question; those that asking again would give again


class Engine:
    """Answers the same questions about one frame after another, in one session; beside them, others of the moment.

    For several threads: whoever answers has to have the ``turn``.
    """

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

        ``questions`` may be none, where all are of the moment. Raises RequestError and BudgetError.
        """
        self._questions = _checked(model, questions)
        self._model = model
        self._budget = model.manifest.budget_of(tokens)
        self._session = session
        self._deadline = deadline
        self._unchanged_below = unchanged_below
        self._cancelled = cancelled
        self._clock = clock
        self._seen: _Seen | None = None
        self._turns = Turns()

    def turn(self, of_the_moment: bool = False) -> AbstractContextManager[None]:
        """Wait for the turn, and have it meanwhile; a question ``of_the_moment`` goes before the next frame."""
        return self._turns.take(urgent=of_the_moment)

    @property
    def question_count(self) -> int:
        """How many questions are asked about each frame."""
        return len(self._questions)

    def answer(self, taken: Taken) -> Result:
        """The result of a frame; this package's errors are in it.

        Raises Cancelled, RequestError where the model was closed, and others.
        """
        return self._result(taken, self._questions, of_the_moment=False)

    def ask(self, reading: Reading, questions: str | Sequence[Question]) -> Result:
        """The answers to questions of the moment about a frame, which was not dropped for them.

        It is not looked at again where it is the one that the KV cache holds, and ``answer`` does not look at it again.
        The deadline begins now. ``changed`` says whether it was looked at. Raises RequestError, and as ``answer``.
        """
        if not (asked := _checked(self._model, questions)):
            raise RequestError(NO_QUESTIONS)
        return self._result(Taken(reading, 0, self._clock()), asked, of_the_moment=True)

    def _result(self, taken: Taken, questions: Sequence[tuple[str, AskOptions]], of_the_moment: bool) -> Result:
        self._model.check_open()
        reading = taken.reading
        due = math.inf if self._deadline is None else taken.monotonic_sec + self._deadline
        seconds: defaultdict[str, float] = defaultdict(float)
        replies: list[Reply | None] = [None] * len(questions)
        changed, errors = True, list[VzEdgeError]()
        try:
            seen = self._look(reading.frame, seconds)
        except VzEdgeError as error:
            errors.append(error)
        else:
            changed, self._seen = seen is not self._seen, seen
            if not of_the_moment:  # which may have looked at it before
                changed, seen.answered = not seen.answered, True
            replies, errors = self._ask_all(seen, questions, due, seconds, {} if of_the_moment else seen.replies)
        ready = self._clock()
        return Result(
            frame_id=reading.number if reading.frame.id is None else reading.frame.id,
            stamp_sec=reading.frame.stamp_sec,
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
        if self._cancelled():
            raise Cancelled
        if self._seen is not None and self._seen.frame is frame:
            return self._seen
        with _timed(seconds, "preprocess_sec"):
            tiles = self._model.vision.tile(picture_of(frame))
            if self._seen is not None and self._unchanged_below is not None:
                manifest = self._model.manifest
                difference = change(self._seen.tiles, tiles, manifest.image, manifest.model.tower.patch_size)
                if difference < self._unchanged_below:
                    return self._seen
        with _timed(seconds, "vision_sec"):
            return _Seen(frame, tiles, self._model.vision.encode(tiles, self._budget))

    def _ask_all(
        self,
        seen: _Seen,
        questions: Sequence[tuple[str, AskOptions]],
        due: float,
        seconds: defaultdict[str, float],
        known: dict[int, Reply],
    ) -> tuple[list[Reply | None], list[VzEdgeError]]:
        """The replies, those ``known`` by the question's place not asked for again, and what went wrong."""
        replies, errors = list[Reply | None](), list[VzEdgeError]()
        for index, question in enumerate(questions):
            try:
                reply = known.get(index) or self._reply(seen, question, due, seconds)
                if reply is not None and _repeatable(question[1], reply):
                    known[index] = reply
                replies.append(reply)
            except VzEdgeError as error:  # this question's; the others may still be answered
                replies.append(None)
                errors.append(error)
        return replies, errors

    def _reply(
        self, seen: _Seen, question: tuple[str, AskOptions], due: float, seconds: defaultdict[str, float]
    ) -> Reply | None:
        """The answer to a question, or None where its time is over before it is begun."""
        if self._cancelled():
            raise Cancelled
        if not seen.in_cache and self._clock() < due:
            seconds["prefill_sec"] += self._session.look(seen.picture).prefill_sec
            seen.in_cache = True
        left = due - self._clock()
        if left <= 0:
            return None
        reply = self._ask(*question, left)
        seconds["prefill_sec"] += reply.prefill_sec
        seconds["decode_sec"] += reply.decode_sec
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


def _checked(model: EdgeModel, questions: str | Sequence[Question]) -> list[tuple[str, AskOptions]]:
    """Questions with their options; a string is one question. Raises RequestError for what is wrong with one."""
    asked = [questions] if isinstance(questions, str) else questions
    if not isinstance(asked, (list, tuple)):
        raise RequestError(f"questions {shown(questions)} are not understood; expected a question, or a list of them")
    pairs = [_pair(question) for question in asked]
    for question, options in pairs:
        model.stream(None, question, **options)  # raises what is wrong with it, and begins nothing
    return pairs


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


def _repeatable(options: AskOptions, reply: Reply) -> bool:
    """Whether asking again would give that reply again."""
    greedy_or_seeded = not options.get("temperature") or options.get("seed") is not None
    return greedy_or_seeded and not _cut_short(reply)


def _cut_short(reply: Reply | None) -> bool:
    return reply is not None and reply.finish_reason == "deadline"


@contextmanager
def _timed(seconds: defaultdict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - started
