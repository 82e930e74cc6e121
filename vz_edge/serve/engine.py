"""One model, one thread that runs it, and a bounded queue in front.

A request takes a place before its body is read, so that what waits in memory is bounded too, and keeps it until its
answer has ended: ``queue_length`` of them may wait while one is answered. Who comes when all places are taken is told
so at once.

    ticket = engine.admit(deadline_sec=60)      # raises Problem: 429 full, 503 shutting down
    try:
        ticket.ask(Question(...))
        async for piece in ticket.pieces(): ... # raises Problem
        ticket.reply
    finally:
        ticket.close()                          # leaves the queue, or ends the answer at its next piece

The event loop owns the tickets' events, the thread owns the model; a lock is between them for the places.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import anyio

from vz_edge.device.cached_model import CachedModel
from vz_edge.device.model import EdgeModel
from vz_edge.device.reply import Reply
from vz_edge.metrics import Metrics
from vz_edge.serve.pictures import decode
from vz_edge.serve.problem import Problem, problem_of

SHORTEST_DEADLINE_SEC = 1e-3  # an answer that begins after its deadline ends with its first token

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What the model is asked: messages that mark their pictures, these as files, and EdgeModel.stream's options."""

    messages: list[dict[str, Any]]
    pictures: list[bytes]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What the function of a ``Ticket.call`` returned."""

    value: Any


Event = str | Reply | Result | Problem
State = Literal["reading", "waiting", "running", "done"]


class Ticket:
    """A request's place, from its admission to the end of its answer. Made by ``Engine.admit``, in the event loop."""

    def __init__(self, engine: Engine, deadline: float) -> None:
        self.deadline = deadline  # by time.monotonic
        self.question: Question | Callable[[CachedModel], Any] | None = None
        self.state: State = "reading"
        self.cancelled = False
        self.asked = 0.0  # by time.monotonic
        self._engine = engine
        self._reply: Reply | None = None
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    @property
    def remaining_sec(self) -> float:
        """Seconds to the deadline; negative after it."""
        return self.deadline - time.monotonic()

    @property
    def finished(self) -> Reply | None:
        """The whole answer, where it has come to its end."""
        return self._reply

    @property
    def reply(self) -> Reply:
        """The whole answer, after the last of its ``pieces``."""
        assert self._reply is not None, "the answer has not ended"
        return self._reply

    def ask(self, question: Question) -> None:
        """Stand in line with ``question``."""
        self._stand_in_line(question)

    async def call(self, function: Callable[[CachedModel], T]) -> T:
        """Stand in line, and return what ``function`` makes of the model in its thread. Raises as ``pieces``."""
        self._stand_in_line(function)
        event = await self._event()
        if isinstance(event, Result):
            value: T = event.value
            return value
        assert isinstance(event, Problem)
        raise event

    async def pieces(self) -> AsyncIterator[str]:
        """The answer's text as it comes. Raises Problem, for what the model raised and at the deadline."""
        while self._reply is None:
            event = await self._event()
            if isinstance(event, str):
                yield event
            elif isinstance(event, Reply) and event.finish_reason != "deadline":
                self._reply = event
            elif isinstance(event, Reply) or self.remaining_sec <= 0:
                raise self._too_late()
            else:
                assert isinstance(event, Problem)
                raise event

    def post(self, event: Event) -> None:
        """Hand an event over to the event loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it all who could listen
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def close(self) -> None:
        """Give the place back, and end the answer if it has not ended; may be called again."""
        self._engine._leave(self)

    def _stand_in_line(self, question: Question | Callable[[CachedModel], Any]) -> None:
        self.question, self.asked = question, time.monotonic()
        self._engine._enqueue(self)

    async def _event(self) -> Event:
        try:
            with anyio.fail_after(max(0.0, self.remaining_sec)):
                return await self._events.get()
        except TimeoutError as error:
            raise self._too_late() from error

    def _too_late(self) -> Problem:
        if self.question is not None and self.state == "waiting":
            return Problem(504, "queue_timeout", "the request's time was up while it waited; try again later")
        return Problem(
            504, "deadline_exceeded", "the answer took longer than this server allows; ask for a shorter one"
        )


class Engine:
    """Answers questions one after the other. ``name`` is what clients call the model.

    ``start`` it before it can answer, and ``stop`` it at the end. What it counts is in ``metrics``. Of the last
    conversations it keeps ``cache_bytes``, which are as in ``EdgeModel.cached``.
    """

    def __init__(self, model: EdgeModel, queue_length: int, cache_bytes: int | None = None) -> None:
        self.model = model
        self._cached = model.cached(cache_bytes)
        self.metrics = metrics = Metrics()
        self.name = model.manifest.name
        self.closing = False
        self.failed = False
        self.on_failure: Callable[[], None] = lambda: None  # called by the engine's thread, when it has ended
        self._busy_since: float | None = None  # by time.monotonic
        self._places = 1 + queue_length
        self._open: set[Ticket] = set()
        self._lock = threading.Lock()
        self._line: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vz-edge engine", daemon=True)
        self._answer_sec = 1.0
        self._admitted = metrics.counter(
            "vz_edge_serve_admitted_total", "Requests that got a place; those not finished wait or are answered."
        )
        self._finished = metrics.counter("vz_edge_serve_finished_total", "Requests that gave their place back.")
        self._refused = metrics.counter("vz_edge_serve_refused_total", "Requests that found all places taken.")
        self._queue_sec = metrics.summary("vz_edge_serve_queue_seconds", "Wait in the queue.")
        self._ttft_sec = metrics.summary("vz_edge_serve_ttft_seconds", "From the end of the wait to the first token.")
        self._total_sec = metrics.summary("vz_edge_serve_answer_seconds", "From the end of the wait to the last token.")
        self._tokens = metrics.counter("vz_edge_serve_tokens_total", "Tokens of prompts, pictures and answers.")
        self._cached_tokens = metrics.counter(
            "vz_edge_serve_cached_tokens_total", "Tokens of prompts and pictures that did not have to be read."
        )
        metrics.gauge(
            "vz_edge_serve_cache_bytes",
            "KV caches and encoded pictures that are kept for later requests.",
            lambda: self._cached.size_bytes,
        )

    @property
    def healthy(self) -> bool:
        """Whether questions are taken and answered."""
        return self._thread.is_alive() and not self.closing

    @property
    def busy_sec(self) -> float:
        """How long the model has been at its present work; 0 where it waits for some."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def admit(self, deadline_sec: float) -> Ticket:
        """A place for a request, which must have its answer in ``deadline_sec``. Raises Problem: 429 or 503."""
        if self.closing:
            raise self._ending()
        with self._lock:
            if len(self._open) >= self._places:
                self._refused.add()
                raise Problem(
                    429,
                    "queue_full",
                    f"all {self._places} places are taken; try again after the seconds that Retry-After says",
                    headers={"Retry-After": str(max(1, round(self._answer_sec)))},
                )
            ticket = Ticket(self, time.monotonic() + deadline_sec)
            self._open.add(ticket)
        self._admitted.add()
        return ticket

    def close(self) -> None:
        """Take no more requests; those that have a place are still answered."""
        self.closing = True

    def abort(self) -> None:
        """End every answer: who still waits for one is told that the server shuts down."""
        with self._lock:
            tickets = list(self._open)
        for ticket in tickets:
            ticket.post(self._ending())
            ticket.close()

    def stop(self, timeout_sec: float) -> bool:
        """End the thread after the last answer; False where it is still busy after ``timeout_sec``.

        Looking at a picture and reading a prompt cannot be interrupted.
        """
        self.close()
        self.abort()
        self._line.put(None)
        self._thread.join(timeout_sec)
        self._cached.clear()
        return not self._thread.is_alive()

    def _enqueue(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket.state != "reading":
                return
            ticket.state = "waiting"
        self._line.put(ticket)

    def _leave(self, ticket: Ticket) -> None:
        ticket.cancelled = True
        with self._lock:
            if ticket.state in ("reading", "waiting"):  # else the thread lets it go
                self._let_go(ticket)

    def _let_go(self, ticket: Ticket) -> None:
        """Free a ticket's place. The lock is held."""
        ticket.state, ticket.question = "done", None
        self._open.discard(ticket)
        self._finished.add()

    def _run(self) -> None:
        """Work until the end. What ends the thread before is told to all who wait, and to who started it."""
        try:
            self._work()
        except BaseException:  # as a panic of a native library, which is no Exception
            logger.critical("the engine has failed; the server ends", exc_info=True)
            self.failed = True
            self.close()
            self.abort()
            self.on_failure()

    def _ending(self) -> Problem:
        return _failed() if self.failed else _shutting_down()

    def _work(self) -> None:
        while (ticket := self._line.get()) is not None:
            with self._lock:
                if ticket.state != "waiting":  # it has left
                    continue
                ticket.state = "running"
            self._busy_since = started = time.monotonic()
            self._queue_sec.observe(started - ticket.asked)
            last = self._answer(ticket)
            self._answer_sec, self._busy_since = time.monotonic() - started, None
            with self._lock:
                self._let_go(ticket)
            ticket.post(last)  # after the place is free: who has its answer may ask again
            del ticket, last  # nothing of a request stays while the thread waits for the next

    def _answer(self, ticket: Ticket) -> Reply | Result | Problem:
        """Answer in pieces; what is returned is the ticket's last event."""
        question = ticket.question
        assert question is not None
        try:
            if not isinstance(question, Question):
                return Result(question(self._cached))
            pictures = [decode(data) for data in question.pictures]
            deadline_sec = max(SHORTEST_DEADLINE_SEC, ticket.remaining_sec)
            stream = self._cached.stream(pictures, question.messages, deadline_sec=deadline_sec, **question.options)
            with contextlib.closing(stream):
                for piece in stream:
                    if ticket.cancelled:
                        raise self._ending()  # or nobody is there to be told
                    ticket.post(piece)
                reply = stream.reply
        except Exception as error:
            problem = problem_of(error)
            if problem.status_code == 500:
                logger.exception("an answer broke off")
            return problem
        self._count(reply)
        return reply

    def _count(self, reply: Reply) -> None:
        self._ttft_sec.observe(reply.ttft_sec)
        self._total_sec.observe(reply.total_sec)
        for kind in ("prompt", "image", "answer"):
            self._tokens.add(getattr(reply, f"{kind}_tokens"), kind=kind)
        self._cached_tokens.add(reply.cached_tokens)


def _shutting_down() -> Problem:
    return Problem(
        503, "shutting_down", "the server shuts down; try again when it is back", headers={"Retry-After": "5"}
    )


def _failed() -> Problem:
    return Problem(
        503, "engine_failed", "the server has failed and ends; try again when it is back", headers={"Retry-After": "5"}
    )
