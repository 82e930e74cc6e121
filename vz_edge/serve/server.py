"""Running the application: a socket, uvicorn, and an end that lets answers finish."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from vz_edge.errors import ServeError
from vz_edge.serve.engine import Engine
from vz_edge.serve.http_connections import Connections, most_connections, protocol_of

BACKLOG = 128  # connections that the system keeps until they are accepted
LAST_WORDS_SEC = 2.0  # for telling those whose answers were cut off


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host`` and ``port`` (0: any free one). Raises ServeError.

    It listens before requests are taken, which wait until then: a port that is bound alone would be given to another
    server too, and the one that listens last would learn it after its model was loaded.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen()
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise ServeError(
            f"cannot listen on {host} port {port} ({error}); choose another --port, or end what is listening there"
        ) from error
    return bound


def url_of(bound: socket.socket, host: str) -> str:
    """What to ask a server that listens on ``bound``."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{bound.getsockname()[1]}"


def run(app: FastAPI, engine: Engine, bound: socket.socket, grace_sec: float, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then let answers finish for up to ``grace_sec``.

    ``ready`` is called when requests are taken. A second SIGINT does not wait. h11 parses HTTP whatever else is
    installed: it is the strict one. Connections are bounded as ``http_connections`` says.
    """
    config = uvicorn.Config(
        app,
        http=protocol_of(Connections(most_connections())),
        ws="none",
        lifespan="off",
        access_log=False,
        log_level=logging.ERROR,  # a warning is written per request that is no HTTP
        backlog=BACKLOG,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=None,
    )
    # uvicorn raises the signal that ended it once more, for those it interrupted; here nobody else waits for it.
    before = {number: signal.signal(number, _nothing) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _Server(config, engine, grace_sec, ready).run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, engine: Engine, grace_sec: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine = engine
        self._grace_sec = grace_sec
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()

        def failed() -> None:
            loop.call_soon_threadsafe(self._end)

        self._engine.on_failure = failed
        self._ready()

    def _end(self) -> None:
        """Shut down as after a signal."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.close()
        asyncio.get_running_loop().call_later(self._grace_sec, self._engine.abort)
        self.config.timeout_graceful_shutdown = self._grace_sec + LAST_WORDS_SEC  # type: ignore[assignment]
        await super().shutdown(sockets)


def _nothing(number: int, frame: object) -> None:
    """Ignore a signal."""
