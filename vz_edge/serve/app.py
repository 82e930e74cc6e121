"""The HTTP server's routes: OpenAI's chat completions for one bundle.

    engine = Engine(EdgeModel.load("llava-13b"), queue_length=8)
    engine.start()
    app = create_app(engine, Settings())

``app`` is a FastAPI application: other routers can be added to it, and ``Guard`` stands in front of them too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from vz_edge import __version__
from vz_edge.errors import VzEdgeError
from vz_edge.metrics import CONTENT_TYPE
from vz_edge.serve.answer import EventStream, completion, events
from vz_edge.serve.body import read_json_body
from vz_edge.serve.connection import while_connected
from vz_edge.serve.engine import Engine, Ticket
from vz_edge.serve.guard import OPEN_PATHS, Guard
from vz_edge.serve.openai_api import ChatCompletion, ChatRequest, Health, ModelCard, ModelList
from vz_edge.serve.problem import CLIENT_CLOSED_REQUEST, Problem, errors_of, problem_of
from vz_edge.serve.question import check_system, model_not_found, parse, question_of
from vz_edge.serve.request_log import TICKET, RequestLog
from vz_edge.serve.settings import Settings
from vz_edge.serve.ui import PAGE_PATHS, ui_router

CHAT_PATH = "/v1/chat/completions"
# The request's schema stands in the route's own description, since the body is read by hand: see ``_read``.
REQUEST_SCHEMA = ChatRequest.model_json_schema(
    ref_template="#/paths/~1v1~1chat~1completions/post/requestBody/content/application~1json/schema/$defs/{model}"
)
CHAT_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": REQUEST_SCHEMA}}}}


class _Form(NamedTuple):
    """How an answer is sent."""

    stream: bool
    with_usage: bool


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application that answers for ``engine``, which the caller starts and stops.

    Raises RequestError where the model's chat template has no place for the system prompt of ``settings``.
    """
    if settings.system:
        check_system(engine.model.chat, settings.system)
    app = FastAPI(title="vz-edge", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(_router(engine, settings))
    if settings.ui:
        app.include_router(ui_router(engine, settings))
    open_paths = OPEN_PATHS | PAGE_PATHS if settings.ui else OPEN_PATHS
    app.add_middleware(Guard, token=settings.token, metrics=engine.metrics, open_paths=open_paths)
    app.add_middleware(RequestLog)
    for kind in (HTTPException, VzEdgeError, Exception):
        app.add_exception_handler(kind, _as_problem)
    return app


def _router(engine: Engine, settings: Settings) -> APIRouter:
    router = APIRouter(responses=errors_of(401, 403))
    card = ModelCard(id=engine.name, created=int(time.time()))

    @router.get("/health", responses=errors_of(503))
    async def health() -> Health:
        """200 while questions are taken and answered; needs no token."""
        if not engine.healthy:
            raise Problem(503, "shutting_down", "the server takes no more requests")
        if engine.busy_sec > settings.deadline_sec:
            raise Problem(
                503,
                "engine_busy",
                f"the model has been at one request for longer than {settings.deadline_sec:g} s; restart the server if "
                "that goes on",
            )
        return Health()

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counts and sums in Prometheus's text format."""
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE)

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The one model there is."""
        return ModelList(data=[card])

    @router.get("/v1/models/{name:path}", responses=errors_of(404))
    async def model(name: str) -> ModelCard:
        """A model by its name."""
        if name != engine.name:
            raise model_not_found(name, engine.name)
        return card

    @router.post(
        CHAT_PATH,
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": {}}}, **errors_of(400, 404, 408, 413, 415, 429, 503, 504)},
        openapi_extra=CHAT_BODY,
    )
    async def chat(request: Request) -> Any:
        """Answer a conversation about pictures."""
        ticket = engine.admit(settings.deadline_sec)
        setattr(request.state, TICKET, ticket)
        try:
            answer = await _chat(request, ticket, engine, settings)
        except ClientDisconnect:
            ticket.close()
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except BaseException:
            ticket.close()
            raise
        if not isinstance(answer, EventStream):  # which closes it when the last event is sent
            ticket.close()
        return answer

    return router


async def _chat(request: Request, ticket: Ticket, engine: Engine, settings: Settings) -> ChatCompletion | EventStream:
    """Read, ask, answer."""
    form = await _read(request, ticket, engine, settings)
    tokenizer, pieces = engine.model.chat.tokenizer, ticket.pieces()
    if not form.stream:
        await while_connected(request, _exhaust(pieces))
        return completion(ticket.reply, engine.name, tokenizer)
    # What goes wrong before the first piece can still be told in the status.
    first = await while_connected(request, anext(pieces, ""))
    return EventStream(events(first, pieces, ticket, engine.name, tokenizer, form.with_usage), ticket)


async def _read(request: Request, ticket: Ticket, engine: Engine, settings: Settings) -> _Form:
    """Read a question and let it stand in line; nothing but it stays in memory while it waits.

    The body is not read by FastAPI, which would do so without bounds.
    """
    body = await read_json_body(request, settings.max_body_bytes, settings.body_sec)
    asked = await asyncio.to_thread(parse, body, engine.name, settings)
    ticket.ask(await while_connected(request, question_of(asked, engine.model.context_length, settings)))
    return _Form(bool(asked.stream), bool(asked.stream_options and asked.stream_options.include_usage))


async def _exhaust(pieces: AsyncIterator[str]) -> None:
    async for _ in pieces:
        pass


async def _as_problem(request: Request, error: Exception) -> Response:
    return problem_of(error).response()
