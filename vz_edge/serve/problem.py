"""What can be wrong with a request, as HTTP status and OpenAI's error body.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "messages", "code": "invalid_image"}}

``message`` says what was wrong, what was expected and what to do; ``code`` is for programs, and OpenAI's own where it
has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from vz_edge.errors import AnswerError, BudgetError, ContextLengthError, DependencyError, ImageError, RequestError

_QUOTE = "'"  # pydantic writes names in quotes
MOST_MESSAGE_CHARACTERS, MOST_PARAM_CHARACTERS = 600, 64
CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is there to read it, but it is counted


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's body of every answer that is not a success."""

    error: ErrorDetail


class Problem(HTTPException):
    """Ends a request with ``status`` and OpenAI's error body. ``param`` is the field that is to blame.

    Message and param are shortened here, in the one place that all errors pass: both may repeat what a client sent.
    """

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message, param = shortened(message, MOST_MESSAGE_CHARACTERS), param and shortened(param, MOST_PARAM_CHARACTERS)
        super().__init__(status, message, dict(headers or {}))
        self.body = ErrorBody(error=ErrorDetail(message=message, type=_type_of(status), param=param, code=code))

    def response(self) -> JSONResponse:
        """The problem as a whole answer."""
        return JSONResponse(self.body.model_dump(), self.status_code, self.headers)


def problem_of(error: Exception) -> Problem:
    """What to tell a client about ``error``; what is not the client's doing is told without its message."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):  # the framework's own: 404, 405
        return Problem(error.status_code, None, str(error.detail), headers=error.headers)
    if isinstance(error, ContextLengthError):
        return Problem(400, "context_length_exceeded", str(error), "messages")
    if isinstance(error, ImageError):
        return Problem(400, "invalid_image", str(error), "messages")
    if isinstance(error, BudgetError):
        return Problem(400, "invalid_value", str(error), "tokens")
    if isinstance(error, RequestError):
        return Problem(400, "invalid_request", str(error))
    if isinstance(error, AnswerError):
        return Problem(400, "answer_breaks_schema", str(error), "response_format")
    if isinstance(error, DependencyError):  # llguidance, where the server was installed without it
        return Problem(400, "unsupported_parameter", str(error), "response_format")
    return Problem(500, "internal_error", "the server failed at this request; its log says where")


def shortened(text: str, most: int) -> str:
    """``text`` as it is, or its beginning and its end with three dots between them: ``most`` characters."""
    if len(text) <= most:
        return text
    half = (most - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route's description says of its answers that are no success."""
    return {status: {"model": ErrorBody} for status in statuses}


def invalid(error: ValidationError, body: bytes, unsupported: frozenset[str]) -> Problem:
    """The first thing that ``error`` says of ``body``; fields in ``unsupported`` are OpenAI's, not this server's."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, why, context = first["type"], first["msg"], first.get("ctx", {})
    if not first["loc"]:
        return Problem(400, "invalid_json", f"the body is not understood ({why}); send one JSON object")
    path, field = _path(first["loc"], from_json(body), kind == "missing"), str(first["loc"][0])
    if kind == "union_tag_invalid":
        path += f".{context['discriminator'].strip(_QUOTE)}"
        why = f"{str(context['tag'])[:64]!r} is not supported here, expected {context['expected_tags']}"
    elif kind == "none_required" or (kind == "too_long" and context["max_length"] == 0):
        why = "this server has nothing of the kind; leave it out"
    if field in unsupported:
        message = f"{path} asks for what this server cannot do ({why}); leave it out"
        return Problem(400, "unsupported_parameter", message, field)
    if kind == "extra_forbidden":
        return Problem(400, "unknown_parameter", f"{path} is not known here; leave it out", field)
    code = "missing_required_parameter" if kind == "missing" else "invalid_value"
    return Problem(400, code, f"{path}: {why}; see /openapi.json for what is expected", field)


def _path(loc: tuple[int | str, ...], data: Any, missing: bool) -> str:
    """Where in ``data`` pydantic's ``loc`` is: without the names that it has for what a value could have been."""
    steps = []
    for place, step in enumerate(loc, start=1):
        if isinstance(data, dict) and step in data:
            data = data[str(step)]
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            data = data[step]
        elif not (missing and place == len(loc)):
            continue
        steps.append(str(step)[:64])
    return ".".join(steps)


def _type_of(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
