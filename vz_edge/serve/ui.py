"""The page for people at ``/``: its files, and what it draws of a picture.

The files are the same for everybody and say nothing of the model, so they need no token; what they ask for does. They
are plain HTML, CSS and JavaScript, and the Content-Security-Policy that they come with lets a browser load nothing
from anywhere else.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from vz_edge.bundle import Manifest
from vz_edge.device.cached_model import CachedModel
from vz_edge.device.image import tile_boxes
from vz_edge.errors import ImageError
from vz_edge.serve.body import read_json_body
from vz_edge.serve.connection import while_connected
from vz_edge.serve.engine import Engine, Ticket
from vz_edge.serve.openai_api import Strict
from vz_edge.serve.pictures import check_pixels, decode, from_data_url
from vz_edge.serve.problem import CLIENT_CLOSED_REQUEST, Problem, errors_of, invalid
from vz_edge.serve.settings import Settings

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("app", "camera", "conversation", "drawing", "page", "server", "terms")
PAGE_FILES = {
    "/": (PAGE / "index.html", "text/html"),
    "/ui/page.css": (PAGE.parents[1] / "pages" / "page.css", "text/css"),  # the look of all pages
    "/ui/style.css": (PAGE / "style.css", "text/css"),
    "/ui/sample.webp": (PAGE / "sample.webp", "image/webp"),  # examples/scene.jpg, in fewer bytes
    **{f"/ui/{name}.js": (PAGE / f"{name}.js", "text/javascript") for name in SCRIPTS},
}
PAGE_PATHS = frozenset(PAGE_FILES)
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self)",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class ServedModel(BaseModel):
    """What the page has to know of the bundle; ``budgets`` are totals, the default first, none for all tokens."""

    name: str
    budgets: list[int]


class LookRequest(Strict):
    """A picture as a data URL; ``tokens`` is one of the bundle's budgets, by default its first."""

    picture: str
    tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class SeenTile(BaseModel):
    """A tile: its box (left, top, right, bottom) in the picture's pixels, and which tokens of it are kept.

    ``kept`` are positions, 0 for CLS, patch p is p + 1. ``merged`` names the contextual token of each position, -1 for
    kept ones; ``attention`` is CLS's to each patch, its mean over heads (with CLS's to itself they sum to 1).
    """

    box: list[float]
    kept: list[int] | None
    merged: list[int] | None
    attention: list[float] | None


class Seen(BaseModel):
    """A picture as the model sees it: ``tiles`` in the model's order, the base tile of a grid first."""

    width: int
    height: int
    grid: tuple[int, int] | None
    patches_per_side: int
    image_tokens: int
    dominant: int | None
    contextual: int | None
    preprocess_sec: float
    vision_sec: float
    tiles: list[SeenTile]


# The request's schema stands in the route's own description, since the body is read by hand.
LOOK_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": LookRequest.model_json_schema()}}}
}


def ui_router(engine: Engine, settings: Settings) -> APIRouter:
    """The page, and what it asks for beside chat completions."""
    router = APIRouter(responses=errors_of(401, 403))
    for path, (file, media_type) in PAGE_FILES.items():
        router.add_api_route(path, _sent(file, media_type), include_in_schema=False)

    @router.get("/ui/model")
    async def model() -> ServedModel:
        """The bundle that is served."""
        manifest = engine.model.manifest
        budgets = [budget.total(manifest.model.max_tiles) for budget in manifest.budgets]
        return ServedModel(name=engine.name, budgets=budgets)

    @router.post(
        "/ui/look",
        response_model=Seen,
        responses=errors_of(400, 408, 413, 415, 429, 503, 504),
        openapi_extra=LOOK_BODY,
    )
    async def look(request: Request) -> Any:
        """Look at a picture: its tiles, and which tokens of them are kept."""
        ticket = engine.admit(settings.deadline_sec)
        try:
            return await _look(request, ticket, engine.model.manifest, settings)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        finally:
            ticket.close()

    return router


def see(model: CachedModel, manifest: Manifest, file: bytes, tokens: int | None) -> Seen:
    """Look at a picture's file, for the questions about it too. Raises Problem where it is broken, and BudgetError."""
    budget = manifest.budget_of(tokens)
    started = time.perf_counter()
    try:
        pixels = decode(file)
        decode_sec = time.perf_counter() - started
        look = model.look(pixels, tokens)
    except ImageError as error:
        raise Problem(400, "invalid_image", str(error), "picture") from error
    result = look.picture
    boxes = tile_boxes(result.original_size, manifest.model, manifest.image)
    attention = None if result.scores is None else (result.scores / manifest.model.tower.heads).astype(np.float64)
    width, height = result.original_size
    return Seen(
        width=width,
        height=height,
        grid=result.grid,
        patches_per_side=manifest.model.tower.patches_per_side,
        image_tokens=len(result.features),
        dominant=None if budget is None else budget.dominant,
        contextual=None if budget is None else budget.contextual,
        preprocess_sec=decode_sec + look.preprocess_sec,
        vision_sec=look.vision_sec,
        tiles=[
            SeenTile(
                box=box.tolist(),
                kept=None if result.kept is None else result.kept[number].tolist(),
                merged=None if result.merged is None else result.merged[number].tolist(),
                attention=None if attention is None else attention[number].round(6).tolist(),
            )
            for number, box in enumerate(boxes)
        ],
    )


async def _look(request: Request, ticket: Ticket, manifest: Manifest, settings: Settings) -> Seen:
    file, tokens = await _read(request, settings)
    looking = functools.partial(see, manifest=manifest, file=file, tokens=tokens)
    return await while_connected(request, ticket.call(looking))


async def _read(request: Request, settings: Settings) -> tuple[bytes, int | None]:
    """The picture's file, measured, and the budget; nothing else of the body stays in memory."""
    body = await read_json_body(request, settings.max_body_bytes, settings.body_sec)
    try:
        asked = LookRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error, body, frozenset()) from error
    file = await asyncio.to_thread(from_data_url, asked.picture, "picture")
    await asyncio.to_thread(check_pixels, [file], settings.max_pixels, "picture")
    return file, asked.tokens


def _sent(file: Path, media_type: str) -> Callable[[], Awaitable[Response]]:
    content = file.read_bytes()

    async def answer() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return answer
