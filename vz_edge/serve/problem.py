"""What can be wrong with a request, as HTTP status and OpenAI's error body.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "messages", "code": "invalid_image"}}

``message`` says what was wrong, what was expected and what to do; ``code`` is for programs, and OpenAI's own where it
has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from vz_edge.errors import AnswerError, BudgetError, ContextLengthError, DependencyError, ImageError, RequestError

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
    """Ends a request with ``status`` and OpenAI's error body. ``param`` is the field that is to blame."""

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
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


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route's description says of its answers that are no success."""
    return {status: {"model": ErrorBody} for status in statuses}


def invalid(error: ValidationError, unsupported: frozenset[str]) -> Problem:
    """The first thing that ``error`` names; fields in ``unsupported`` are OpenAI's, but not this server's."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    why = first["msg"]
    if not first["loc"]:
        return Problem(400, "invalid_json", f"the body is not understood ({why}); send one JSON object")
    # Behind the field's name pydantic's path has names of its own, for what a value could have been.
    path, field = ".".join(str(step) for step in first["loc"]), str(first["loc"][0])
    if field in unsupported:
        message = f"{path} asks for what this server cannot do ({why}); leave it out"
        return Problem(400, "unsupported_parameter", message, field)
    if first["type"] == "extra_forbidden":
        return Problem(400, "unknown_parameter", f"{path} is not known here; leave it out", field)
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return Problem(400, code, f"{path}: {why}; see /openapi.json for what is expected", field)


def _type_of(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
