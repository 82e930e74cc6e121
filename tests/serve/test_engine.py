"""The queue: places, order, deadlines, and who leaves early."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.serve.asking import PIECES, ScriptedModel, request
from vz_edge.device.model import EdgeModel
from vz_edge.serve.app import create_app
from vz_edge.serve.engine import Engine, Question, Ticket
from vz_edge.serve.problem import Problem
from vz_edge.serve.settings import Settings

QUESTION = Question([{"role": "user", "content": "What?"}], [])
WAIT_SEC = 10.0


def in_a_loop(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), WAIT_SEC))  # type: ignore[arg-type]


async def text_of(ticket: Ticket) -> str:
    return "".join([piece async for piece in ticket.pieces()])


async def started(model: ScriptedModel) -> None:
    """Wait until the model has begun an answer."""
    assert await asyncio.to_thread(model.started.acquire, timeout=WAIT_SEC)


async def closed(model: ScriptedModel) -> None:
    """Wait until an answer was ended early."""
    assert await asyncio.to_thread(model.closed.acquire, timeout=WAIT_SEC)


def refused(engine: Engine) -> Problem:
    with pytest.raises(Problem) as raised:
        engine.admit(60)
    return raised.value


def test_places_are_taken_before_anything_is_asked(scripted_engine: Engine, scripted: ScriptedModel) -> None:
    async def test() -> None:
        one, two = scripted_engine.admit(60), scripted_engine.admit(60)
        problem = refused(scripted_engine)
        assert (problem.status_code, problem.body.error.code) == (429, "queue_full")
        assert problem.headers is not None and int(problem.headers["Retry-After"]) >= 1
        one.close()
        one.close()
        three = scripted_engine.admit(60)
        assert refused(scripted_engine).status_code == 429
        scripted.let_go(2 * len(PIECES))
        for ticket in (three, two):
            ticket.ask(QUESTION)
        assert await text_of(three) == await text_of(two) == "".join(PIECES)
        assert three.reply.answer_tokens == 3
        scripted_engine.admit(60).close(), scripted_engine.admit(60).close()

    in_a_loop(test)


def test_who_leaves_the_queue_is_never_answered(scripted_engine: Engine, scripted: ScriptedModel) -> None:
    async def test() -> None:
        running, waiting = scripted_engine.admit(60), scripted_engine.admit(60)
        running.ask(QUESTION)
        await started(scripted)
        waiting.ask(QUESTION)
        waiting.close()
        last = scripted_engine.admit(60)  # the place is free at once
        last.ask(QUESTION)
        scripted.let_go(2 * len(PIECES))
        assert await text_of(running) == await text_of(last) == "".join(PIECES)
        assert len(scripted.asked) == 2

    in_a_loop(test)


def test_who_leaves_while_answered_ends_the_answer(scripted_engine: Engine, scripted: ScriptedModel) -> None:
    async def test() -> None:
        running, waiting = scripted_engine.admit(60), scripted_engine.admit(60)
        running.ask(QUESTION)
        await started(scripted)
        running.close()
        assert refused(scripted_engine).status_code == 429  # the model is still at it
        scripted.let_go(1)
        await closed(scripted)
        scripted.let_go(len(PIECES))
        waiting.ask(QUESTION)
        assert await text_of(waiting) == "".join(PIECES)

    in_a_loop(test)


def test_time_in_the_queue_counts(scripted_engine: Engine, scripted: ScriptedModel) -> None:
    async def test() -> None:
        running, waiting = scripted_engine.admit(60), scripted_engine.admit(0.1)
        running.ask(QUESTION)
        await started(scripted)
        waiting.ask(QUESTION)
        with pytest.raises(Problem) as raised:
            await text_of(waiting)
        assert (raised.value.status_code, raised.value.body.error.code) == (504, "queue_timeout")
        waiting.close()
        running.close()

    in_a_loop(test)


def test_shutting_down_answers_who_is_in_and_nobody_else(scripted_engine: Engine, scripted: ScriptedModel) -> None:
    async def test() -> None:
        running, waiting = scripted_engine.admit(60), scripted_engine.admit(60)
        running.ask(QUESTION)
        await started(scripted)
        waiting.ask(QUESTION)
        scripted_engine.close()
        assert not scripted_engine.healthy
        assert refused(scripted_engine).status_code == 503
        scripted.let_go(len(PIECES))
        assert await text_of(running) == "".join(PIECES)
        scripted_engine.abort()
        with pytest.raises(Problem) as raised:
            await text_of(waiting)
        assert (raised.value.status_code, raised.value.body.error.code) == (503, "shutting_down")

    in_a_loop(test)


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


def test_what_ends_the_engines_thread_is_told_to_all_who_wait(model: EdgeModel) -> None:
    class Panicking(ScriptedModel):
        def stream(self, image: Any, prompt: Any, **options: Any) -> Any:
            self.started.release()
            self._go.acquire()
            raise Panic("native code gave up")

    panicking, ended = Panicking(model), threading.Event()
    engine = Engine(panicking, queue_length=1)  # type: ignore[arg-type]
    engine.on_failure = ended.set
    engine.start()

    async def test() -> None:
        running, waiting = engine.admit(60), engine.admit(60)
        running.ask(QUESTION)
        await started(panicking)
        waiting.ask(QUESTION)
        panicking.let_go(1)
        for ticket in (running, waiting):
            with pytest.raises(Problem) as raised:
                await text_of(ticket)
            assert (raised.value.status_code, raised.value.body.error.code) == (503, "engine_failed")
        assert await asyncio.to_thread(ended.wait, WAIT_SEC)
        assert engine.failed and not engine.healthy
        assert refused(engine).body.error.code == "engine_failed"

    in_a_loop(test)


def test_health_tells_of_a_model_that_is_at_one_request_for_too_long(
    scripted_engine: Engine, scripted: ScriptedModel
) -> None:
    async def test() -> None:
        client = TestClient(create_app(scripted_engine, Settings(deadline_sec=0.05)), "http://localhost")
        assert client.get("/health").status_code == 200
        running = scripted_engine.admit(60)
        running.ask(QUESTION)
        await started(scripted)
        await asyncio.sleep(0.1)
        response = client.get("/health")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_busy")
        scripted.let_go(len(PIECES))
        await text_of(running)
        assert client.get("/health").status_code == 200

    in_a_loop(test)


class Connection:
    """An HTTP connection as ASGI has it: the body is there, and the client goes when ``leave`` is called."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self._body: bytes | None = json.dumps(body).encode()
        self._gone = asyncio.Event()

    def leave(self) -> None:
        self._gone.set()

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def run(self, engine: Engine, settings: Settings) -> asyncio.Task[None]:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        return asyncio.ensure_future(create_app(engine, settings)(scope, self.receive, self.send))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_answer(scripted_engine: Engine, scripted: ScriptedModel, stream: bool) -> None:
    async def test() -> None:
        connection = Connection(request(stream=stream))
        served = connection.run(scripted_engine, Settings())
        await started(scripted)
        scripted.let_go(1)
        if stream:
            while len(connection.sent) < 3:  # the start, the role, the first piece
                await asyncio.sleep(0.01)
        connection.leave()
        await served
        scripted.let_go(1)
        await closed(scripted)

    in_a_loop(test)


def test_a_client_that_goes_leaves_the_queue(scripted_engine: Engine, scripted: ScriptedModel) -> None:
    async def test() -> None:
        running = scripted_engine.admit(60)
        running.ask(QUESTION)
        await started(scripted)
        connection = Connection(request())
        served = connection.run(scripted_engine, Settings())
        while not any(ticket.state == "waiting" for ticket in scripted_engine._open):
            await asyncio.sleep(0.01)
        assert refused(scripted_engine).status_code == 429
        connection.leave()
        await served
        scripted_engine.admit(60).close()
        assert len(scripted.asked) == 1
        running.close()

    in_a_loop(test)


def test_a_body_that_does_not_come_is_a_408(scripted_engine: Engine) -> None:
    async def test() -> None:
        connection = Connection({})
        connection._body = None
        await connection.run(scripted_engine, Settings(body_sec=0.05))
        assert connection.sent[0]["status"] == 408
        scripted_engine.admit(60).close(), scripted_engine.admit(60).close()

    in_a_loop(test)
