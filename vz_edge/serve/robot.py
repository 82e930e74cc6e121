"""What the nodes of robot middleware share: frames are pushed in as they come, answers go out as JSON.

A question is written as its text, or as a JSON object where it has options::

    {"question": "Which tool lies on the table?", "schema": ["hammer", "wrench", "none"]}
"""

from __future__ import annotations

import dataclasses
import json
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from vz_edge.arguments import shown
from vz_edge.arguments import text as checked_text
from vz_edge.device.model import EdgeModel
from vz_edge.device.options import AskOptions
from vz_edge.device.reply import Reply
from vz_edge.errors import RequestError, VzEdgeError
from vz_edge.strict import SchemaError, load
from vz_edge.watch import Frame, IteratorSource, Result
from vz_edge.watch.engine import Cancelled, Engine, Question
from vz_edge.watch.reader import Reading
from vz_edge.watch.watch import check_positive


@dataclass(frozen=True)
class _WrittenQuestion:
    """A question with those of ``EdgeModel.ask``'s options that JSON can say."""

    question: str
    schema: dict[str, Any] | tuple[str, ...] | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None


def question_of(text: str) -> Question:
    """The question that ``text`` says: all of it or, where it begins with a brace, a JSON object. Raises RequestError.

    What is wrong with the options' values is found when the question is asked.
    """
    text = checked_text("a question", text).strip()
    if not text:
        raise RequestError("a question is empty; write one, or leave it out")
    if not text.startswith("{"):
        return text
    try:
        written = load(_WrittenQuestion, json.loads(text))
    except (SchemaError, ValueError, RecursionError) as error:
        raise RequestError(
            f'the question {shown(text)} is not understood ({error}); expected text, or {{"question": "...", ...}}'
        ) from error
    options = {name: value for name, value in vars(written).items() if name != "question" and value is not None}
    return written.question, cast(AskOptions, options)


def as_json(result: Result, questions: Sequence[Question]) -> str:
    """A result of ``questions`` in one line. ``docs/robots.md`` lists the fields."""
    texts = [question if isinstance(question, str) else question[0] for question in questions]
    names = ("frame_id", "stamp_sec", "captured_at", "age_sec", "latency_sec", "dropped", "changed", "deadline_missed")
    return json.dumps(
        {
            **{name: getattr(result, name) for name in names},
            "error": None if result.error is None else str(result.error),
            "timings": dataclasses.asdict(result.timings),
            "answers": [_answer(text, reply) for text, reply in zip(texts, result.replies, strict=True)],
        }
    )


def error_as_json(error: VzEdgeError) -> str:
    """What is sent in the place of answers where there are none."""
    return json.dumps({"error": str(error), "answers": []})


def _answer(question: str, reply: Reply | None) -> dict[str, Any]:
    if reply is None:
        return {"question": question, "text": None, "value": None, "probabilities": None, "finish_reason": None}
    return {
        "question": question,
        "text": reply.text,
        "value": reply.value,
        "probabilities": None if reply.probabilities is None else dict(reply.probabilities),
        "finish_reason": reply.finish_reason,
    }


@dataclass(frozen=True)
class CameraSettings:
    """As in ``EdgeModel.watch``."""

    every: float | None = None
    deadline: float | None = None
    unchanged_below: float | None = None
    system: str | None = None
    tokens: int | None = None


class PushedCamera:
    """Answers about the newest frame of those that callbacks push.

    ``questions``, if there are any, are asked about each frame that is the newest when its turn comes, in a thread of
    its own, which calls ``on_result``. Beside that, ``ask`` answers others, in the same session: a frame is looked at
    and read once, whatever is asked about it.
    """

    def __init__(
        self,
        model: EdgeModel,
        questions: Sequence[Question],
        settings: CameraSettings,
        on_result: Callable[[Result], object],
    ) -> None:
        """Raises RequestError, BudgetError and ContextLengthError; those of ``settings`` without questions too."""
        check_positive(every=settings.every, deadline=settings.deadline, unchanged_below=settings.unchanged_below)
        model.manifest.budget_of(settings.tokens)
        self._closed = False
        self._count = 0
        self._newest: Reading | None = None
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()  # the watch empties it at once
        source = IteratorSource(iter(self._frames.get, None))
        self._background = None
        if questions:
            watch = model.watch(source, questions, stalled_after=None, **vars(settings))
            self._background = watch.background(on_result)
        else:
            self._engine = Engine(
                model,
                model.session(settings.system),
                (),
                settings.tokens,
                settings.deadline,
                settings.unchanged_below,
                lambda: self._closed,
            )

    def put(self, frame: Frame) -> None:
        """Take in a frame, without waiting. Raises what ended the watch, where something did."""
        if self._background is not None and not self._background.join(0):
            self._frames.put(frame)  # while there is a watch that empties the queue
        self._newest = Reading(frame, self._count, time.time(), time.monotonic())
        self._count += 1

    def ask(self, questions: Sequence[Question]) -> Result:
        """Answer ``questions`` about the newest frame, in this thread. Raises RequestError, ContextLengthError."""
        newest = self._newest
        if newest is None:
            raise RequestError("no picture has come yet; check the camera and the name of its topic or input")
        if self._background is not None:
            return self._background.ask(newest, questions)
        try:
            with self._engine.turn(of_the_moment=True):
                return self._engine.ask(newest, questions)
        except Cancelled:
            raise RequestError("the camera was stopped before the answer; start it and ask again") from None

    def finish(self) -> None:
        """No more frames come: wait until the last one is answered. Raises what ended the watch before."""
        self._frames.put(None)
        if self._background is not None:
            self._background.join()

    def close(self) -> None:
        """Stop at once; answers that are being written end between two tokens. Raises as ``finish``."""
        self._closed = True
        self._frames.put(None)
        if self._background is not None:
            self._background.close()
