"""One line in the log ``vz_edge.serve`` for each request: nothing of what was asked, answered or shown.

POST /v1/chat/completions 200 0.412 s; 371 of 402 prompt tokens cached, 12 written
"""

from __future__ import annotations

import logging
import time
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vz_edge.device.reply import Reply
from vz_edge.serve.engine import Ticket

MOST_PATH_CHARACTERS = 200
TICKET = "ticket"  # in a request's state, where it asks the model something

logger = logging.getLogger("vz_edge.serve")


class RequestLog:
    """An ASGI layer in front of all others, so that what they refuse is logged too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500  # the framework's, for what is raised through this layer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        state = scope.setdefault("state", {})
        try:
            await self._app(scope, receive, noted)
        finally:
            path = quote(scope["path"])[:MOST_PATH_CHARACTERS]  # a client's line break stays %0A
            seconds = time.perf_counter() - started
            answer = _answer(state.get(TICKET), status)
            logger.info("%s %s %d %.3f s%s", scope["method"], path, status, seconds, answer)


def _answer(ticket: Ticket | None, status: int) -> str:
    if ticket is None or status != 200:
        return ""
    reply = ticket.finished
    return "; broken off" if reply is None else f"; {_tokens(reply)}"


def _tokens(reply: Reply) -> str:
    prompt_tokens = reply.prompt_tokens + reply.image_tokens
    return f"{reply.cached_tokens} of {prompt_tokens} prompt tokens cached, {reply.answer_tokens} written"
