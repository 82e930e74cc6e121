"""Reading a request's body within bounds of size and time, whatever its headers promise."""

from __future__ import annotations

import anyio
from starlette.requests import Request

from vz_edge.serve.problem import Problem


async def read_json_body(request: Request, max_bytes: int, max_sec: float) -> bytes:
    """The body of a request that declares JSON. Raises Problem: 408, 413 or 415; starlette's ClientDisconnect.

    A promised length over the limit is refused at once; chunked bodies, and lengths that lie, are counted as they
    come in. To ask for the JSON type is a protection too: see ``guard``.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Problem(415, "unsupported_media_type", "the body must be sent as Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(415, "unsupported_media_type", "the body must not be compressed; leave Content-Encoding out")
    promised = request.headers.get("content-length", "0")
    if promised.isdecimal() and int(promised[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        with anyio.fail_after(max_sec):
            async for chunk in request.stream():
                if len(body) + len(chunk) > max_bytes:
                    raise _too_large(max_bytes)
                body += chunk
    except TimeoutError as error:
        raise Problem(
            408, "request_timeout", f"the body did not arrive within {max_sec:g} s; send it faster, or less of it"
        ) from error
    return bytes(body)


def _too_large(max_bytes: int) -> Problem:
    return Problem(
        413, "body_too_large", f"the body has more than {max_bytes} bytes; scale the pictures down or send fewer"
    )
