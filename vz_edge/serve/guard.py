"""Who may talk to the server: an ASGI layer in front of every route, which counts what goes out.

Without a token the server listens on loopback, where a web page in the user's browser could still reach it. Two things
stop that. A page's script on another site may not send JSON across origins, since the server sends no CORS headers
(``body.py`` refuses what is not declared as JSON); and a page that pretends to be the same site, by having its own
name resolve to 127.0.0.1 (DNS rebinding), gives itself away by its Host header, which must name loopback.

With a token, the token decides.
"""

from __future__ import annotations

import hmac
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vz_edge.metrics import Metrics
from vz_edge.serve.problem import Problem
from vz_edge.serve.settings import is_loopback

HOST_HEADER = re.compile(r"(?:(?P<name>[^:\[\]]+)|\[(?P<ipv6>[^\[\]]+)\])(?::[0-9]*)?")
OPEN_PATHS = frozenset({"/health"})  # for watchdogs that have no token; says nothing but "ok"


class Guard:
    """Refuses what comes from strangers, before a byte of the body is read; counts responses by status."""

    def __init__(
        self, app: ASGIApp, token: str | None, metrics: Metrics, open_paths: frozenset[str] = OPEN_PATHS
    ) -> None:
        self._app = app
        self._token = token
        self._open_paths = open_paths
        self._responses = metrics.counter("vz_edge_serve_responses_total", "HTTP responses by status.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._responses.add(status=str(message["status"]))
            await send(message)

        problem = self._refusal(scope)
        try:
            await (problem.response() if problem else self._app)(scope, receive, counted)
        except Exception:  # the framework makes the response outside of this layer
            if not started:
                self._responses.add(status="500")
            raise

    def _refusal(self, scope: Scope) -> Problem | None:
        if self._token is None:
            return None if _names_loopback(_values(scope, b"host")) else _WRONG_HOST
        if scope["path"] in self._open_paths or _has_token(_values(scope, b"authorization"), self._token):
            return None
        return _WRONG_TOKEN


_WRONG_HOST = Problem(
    403,
    "host_not_allowed",
    "the Host header does not name this machine; ask 127.0.0.1 or localhost, or start the server with a token",
)
_WRONG_TOKEN = Problem(
    401,
    "invalid_api_key",
    "the token is missing or wrong; send the header 'Authorization: Bearer <token>'",
    headers={"WWW-Authenticate": "Bearer"},
)


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _has_token(authorizations: list[bytes], token: str) -> bool:
    if len(authorizations) != 1:
        return False
    scheme, _, given = authorizations[0].partition(b" ")
    return hmac.compare_digest(given.strip(), token.encode()) and scheme.lower() == b"bearer"


def _names_loopback(hosts: list[bytes]) -> bool:
    """Whether there is one Host header, and its name is loopback's, with or without a port (RFC 9110, 7.2)."""
    parts = HOST_HEADER.fullmatch(hosts[0].decode("latin-1")) if len(hosts) == 1 else None
    return parts is not None and is_loopback(parts["name"] or parts["ipv6"])
