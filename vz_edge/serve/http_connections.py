"""Which connections are kept: a stranger who only opens some must not take the place of one who asks.

A connection is *waiting* while no whole request head has come on it, *busy* from then to the end of the answer. There
are at most ``most`` of both, fewer than the process may have files open.

- A waiting connection is closed after HEAD_SEC, however many bytes of a head it has sent (slow loris, RFC 9112 9.5).
- When all places are taken, the connection that has waited longest makes room for the newcomer. Who asks at once is
  always heard, whoever else only holds connections.
- When all places are busy, RESERVED further ones are for ``/health`` and ``/metrics`` alone; what else is asked there
  gets a 503. Behind these, newcomers are closed.
- A client that does not read its answer loses its connection when nothing of it could be sent for WRITE_SEC.

What is closed is counted, and told in one line of the log per LOG_SEC.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vz_edge.serve.problem import Problem

MOST_CONNECTIONS = 512
FEWEST_CONNECTIONS = 4
RESERVED = 8
OTHER_FILES = 64  # for pictures that are fetched, a child process, the model's own files
HEAD_SEC = 10.0
WRITE_SEC = 30.0
LOG_SEC = 10.0
ALWAYS_ANSWERED = frozenset({"/health", "/metrics"})

logger = logging.getLogger(__name__)


def most_connections() -> int:
    """How many connections this process can have beside the files that it has open, its own limit respected."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        limit = MOST_CONNECTIONS * 2 if limit == resource.RLIM_INFINITY else limit
        taken = len(os.listdir("/proc/self/fd"))
    except (ImportError, OSError):
        return MOST_CONNECTIONS // 4
    return max(FEWEST_CONNECTIONS, min(MOST_CONNECTIONS, limit - taken - OTHER_FILES - RESERVED))


class Connections:
    """The places of a server's connections, ``most`` and RESERVED. For the event loop's thread."""

    def __init__(self, most: int, head_sec: float = HEAD_SEC, write_sec: float = WRITE_SEC) -> None:
        self.most = most
        self.head_sec = head_sec
        self.write_sec = write_sec
        self._waiting: dict[Connection, float] = {}  # since when, by time.monotonic; the longest first
        self._busy: set[Connection] = set()
        self._reserved: set[Connection] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = 0
        self._logged = 0.0

    def admit(self, newcomer: Connection) -> bool:
        """Give a place to a new connection, one with no request yet; False where there is none."""
        if len(self._waiting) + len(self._busy) >= self.most:
            oldest = next(iter(self._waiting), None)
            if oldest is None and len(self._reserved) >= RESERVED:
                self._tell()
                return False
            if oldest is None or oldest in self._reserved:
                self._reserved.add(newcomer)
                newcomer.app = _no_place_but_for(ALWAYS_ANSWERED, newcomer.app)
            if oldest is not None:
                self._close(oldest)
        self._waiting[newcomer] = time.monotonic()
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self.head_sec / 10, self._sweep_late)
        return True

    def busy(self, connection: Connection) -> None:
        """A request's head has come."""
        if self._waiting.pop(connection, None) is not None:
            self._busy.add(connection)

    def waits(self, connection: Connection) -> None:
        """An answer has ended; the connection waits for its next request."""
        if connection in self._busy:
            self._busy.remove(connection)
            self._waiting[connection] = time.monotonic()

    def forget(self, connection: Connection) -> None:
        """A connection was lost."""
        self._waiting.pop(connection, None)
        self._busy.discard(connection)
        self._reserved.discard(connection)

    def drop(self, connection: Connection) -> None:
        """Close a connection whose client does not read."""
        self._close(connection)

    def _sweep_late(self) -> None:
        self._sweep = None
        late = time.monotonic() - self.head_sec
        for connection in [waiting for waiting, since in self._waiting.items() if since <= late]:
            self._close(connection)
        if self._waiting:
            self._sweep = asyncio.get_running_loop().call_later(self.head_sec / 10, self._sweep_late)

    def _close(self, connection: Connection) -> None:
        self.forget(connection)
        connection.transport.abort()
        self._tell()

    def _tell(self) -> None:
        self._closed += 1
        if time.monotonic() - self._logged >= LOG_SEC:
            logger.warning("%d connection(s) closed: no request in time, no place, or not read", self._closed)
            self._closed, self._logged = 0, time.monotonic()


class Connection(H11Protocol):
    """uvicorn's connection, which says when it waits and when it is busy."""

    places: Connections  # of the class that ``protocol_of`` makes
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As asyncio calls it."""
        super().connection_made(transport)
        if not self.places.admit(self):
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio calls it."""
        self.places.forget(self)
        self.resume_writing()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """As uvicorn calls it, when bytes have come or an answer has ended."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self.places.busy(self)

    def on_response_complete(self) -> None:
        """As uvicorn calls it."""
        self.places.waits(self)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """As asyncio calls it, when the client does not take what is sent."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.places.write_sec, self.places.drop, self)

    def resume_writing(self) -> None:
        """As asyncio calls it, when the client takes what is sent again."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        if self.flow is not None:
            super().resume_writing()


def protocol_of(connections: Connections) -> type[asyncio.Protocol]:
    """The class of a server's connections, as uvicorn's ``http`` takes it."""
    return type("PlacedConnection", (Connection,), {"places": connections})


def _no_place_but_for(paths: frozenset[str], app: Any) -> Any:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        refused = _NO_PLACE.response() if scope["path"] not in paths else cast(ASGIApp, app)
        await refused(scope, receive, send)

    return answer


_NO_PLACE = Problem(
    503, "no_connection_free", "all connections are busy; try again later", headers={"Retry-After": "5"}
)
