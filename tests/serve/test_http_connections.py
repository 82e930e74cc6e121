"""Who only holds connections takes nobody's place."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from tests.serve.asking import WAIT_SEC
from vz_edge.serve.http_connections import RESERVED, Connections, most_connections, protocol_of
from vz_edge.serve.server import bind

MOST = 4


class App:
    """Answers at once; ``/held`` when it is let go; ``/large`` with more than a socket takes."""

    def __init__(self) -> None:
        self.holding = threading.Semaphore(0)
        self.go = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/held":
            self.holding.release()
            while not self.go.is_set():
                await asyncio.sleep(0.01)
        if scope["path"] == "/large":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(1000):
                await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        await PlainTextResponse("here")(scope, receive, send)


@contextlib.contextmanager
def serving(app: App, head_sec: float = 60.0, write_sec: float = 60.0) -> Iterator[int]:
    protocol = protocol_of(Connections(MOST, head_sec, write_sec))
    server = uvicorn.Server(
        uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_level="critical")  # type: ignore[arg-type]
    )
    with bind("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield bound.getsockname()[1]
        finally:
            app.go.set()
            server.should_exit = True
            thread.join(WAIT_SEC)


def opened(port: int, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT_SEC)
    connection.sendall(sent)
    return connection


def is_closed(connection: socket.socket) -> bool:
    with contextlib.suppress(ConnectionError):
        return connection.recv(100) == b""
    return True


def status(port: int, path: str) -> int:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SEC)) as connection:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        response.read()
        return response.status


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\nX: "])
def test_idle_connections_make_room_the_oldest_first(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), serving(App()) as port, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(opened(port, sent)) for _ in range(50 * MOST)]
        assert status(port, "/") == 200
        assert all(is_closed(connection) for connection in idle[: -MOST + 1])
        idle[-1].settimeout(0.05)
        with pytest.raises(TimeoutError):
            idle[-1].recv(1)
    assert len([record for record in caplog.records if record.name.startswith("vz_edge")]) <= 2


def test_a_head_that_does_not_come_is_not_waited_for() -> None:
    with serving(App(), head_sec=0.3) as port, opened(port) as silent, opened(port, b"GET / HT") as slow:
        for _ in range(100):
            with contextlib.suppress(ConnectionError):
                slow.sendall(b"T")
            time.sleep(0.01)
        assert is_closed(silent) and is_closed(slow)
        with opened(port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") as kept:
            assert kept.recv(1000).startswith(b"HTTP/1.1 200")
            while kept.recv(1000):
                pass


def test_health_and_metrics_have_a_place_when_all_others_are_busy() -> None:
    app = App()
    held = b"GET /held HTTP/1.1\r\nHost: a\r\n\r\n"
    with serving(app) as port, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(opened(port, held)) for _ in range(MOST)]
        for _ in busy:
            assert app.holding.acquire(timeout=WAIT_SEC)
        for _ in range(3 * RESERVED):
            assert (status(port, "/health"), status(port, "/metrics"), status(port, "/other")) == (200, 200, 503)
        idle = [stack.enter_context(opened(port)) for _ in range(3 * RESERVED)]
        assert status(port, "/health") == 200
        app.go.set()
        for connection in busy:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert status(port, "/other") == 200
        del idle


def test_who_does_not_read_loses_the_connection() -> None:
    with serving(App(), write_sec=0.3) as port, opened(port, b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n") as connection:
        time.sleep(1.5)
        received = 0
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(2**20):
                received += len(data)
        assert received < 100_000_000


def test_the_cap_is_below_the_limit_of_files() -> None:
    assert 4 <= most_connections() <= max(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
