"""Fetching a picture from a URL that a stranger wrote, without becoming the stranger's hand inside the network.

Server-side request forgery is asking a server for an address that only the server can reach: itself, the robot beside
it, a cloud's metadata service. What is refused is therefore decided on addresses, not on how they are written: the
host is resolved once, every address it has must be public (``addresses``), and the connection goes to the very
addresses that were checked, one after the other until one answers, so that a name cannot mean something else a moment
later. Each redirect begins anew.

h11 speaks HTTP; the connection is asyncio's. Proxies that the environment names are not used: they resolve names
themselves.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import anyio
import h11

from vz_edge.serve.addresses import Address, is_public
from vz_edge.serve.name_lookup import look_up
from vz_edge.serve.problem import Problem
from vz_edge.serve.settings import RemoteLimits

REDIRECTS = frozenset({301, 302, 303, 307, 308})
PORTS = {"http": 80, "https": 443}
CHUNK_BYTES = 64 * 1024
MOST_ADDRESSES = 8  # of a host, that are tried


class Target(NamedTuple):
    """A URL taken apart; ``path`` has the query."""

    scheme: str
    host: str
    port: int
    path: str


class RemoteError(Exception):
    """Why a picture could not be fetched; the message is for the one who sent the URL."""


async def fetch(url: str, limits: RemoteLimits, where: str, allowed: Callable[[Address], bool] | None = None) -> bytes:
    """The picture file at an http or https URL. Raises Problem, which blames the field ``where``.

    ``allowed`` decides which addresses may be connected to, by default ``is_public``.
    """
    try:
        with anyio.fail_after(limits.total_sec):
            for _ in range(1 + limits.max_redirects):
                answer = await _get(parse_url(url), limits, allowed or is_public)
                if isinstance(answer, bytes):
                    return answer
                url = urljoin(url, answer)
        raise RemoteError(f"it redirects more than {limits.max_redirects} times; send the last URL")
    except TimeoutError as error:
        raise _problem(f"it took longer than {limits.total_sec:g} s; send the picture itself", where) from error
    # What the host does wrong: no such name (OSError), a bad certificate (OSError), no HTTP, no valid Location.
    except (OSError, h11.ProtocolError, ValueError) as error:
        raise _problem("its host cannot be reached or does not speak HTTP; check the URL", where) from error
    except RemoteError as error:
        raise _problem(str(error), where) from error


def parse_url(url: str) -> Target:
    """Take a URL apart. Raises RemoteError for what is no plain http or https URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise RemoteError(f"it is no URL ({error}); expected http:// or https://") from error
    if parts.scheme not in PORTS or not parts.hostname:
        raise RemoteError("it is no web address; expected http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise RemoteError("it has a user name in it; leave that out")
    path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    if not (url.isascii() and url.isprintable()) or " " in url:
        raise RemoteError("it has characters that must be percent-encoded; encode them")
    return Target(parts.scheme, parts.hostname, port, path)


async def _get(target: Target, limits: RemoteLimits, allowed: Callable[[Address], bool]) -> bytes | str:
    """The body of a picture, or where a redirect leads."""
    addresses = await _resolve(target, limits, allowed)
    context = ssl.create_default_context() if target.scheme == "https" else None
    reader, writer = await _connect(target, addresses, context, limits.connect_sec)
    try:
        return await _exchange(target, reader, writer, limits.max_bytes)
    finally:
        writer.close()


async def _resolve(target: Target, limits: RemoteLimits, allowed: Callable[[Address], bool]) -> list[Address]:
    """The addresses of the host. Raises RemoteError unless all of them are allowed."""
    try:
        with anyio.fail_after(limits.lookup_sec):
            addresses = await look_up(target.host, target.port)
    except TimeoutError as error:
        raise RemoteError(f"its host name was not found within {limits.lookup_sec:g} s; check the URL") from error
    if not addresses or not all(allowed(address) for address in addresses):
        raise RemoteError("its host is not on the open internet; send the picture itself as a data URL")
    return addresses[:MOST_ADDRESSES]


async def _connect(
    target: Target, addresses: list[Address], context: ssl.SSLContext | None, each_sec: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first of ``addresses`` that answers; they are numbers, so nothing is looked up again.

    Raises the OSError of the last one where none does.
    """
    failure: OSError = OSError("the host has no address")
    for address in addresses:
        try:
            with anyio.fail_after(each_sec):
                return await asyncio.open_connection(
                    str(address), target.port, ssl=context, server_hostname=target.host if context else None
                )
        except OSError as error:  # a TimeoutError is one
            failure = ConnectionError(f"{address} does not answer") if isinstance(error, TimeoutError) else error
    raise failure


async def _exchange(
    target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_bytes: int
) -> bytes | str:
    connection = h11.Connection(h11.CLIENT)
    host = f"[{target.host}]" if ":" in target.host else target.host
    port = "" if target.port == PORTS[target.scheme] else f":{target.port}"
    headers = [("Host", host + port), ("Accept", "image/*"), ("Accept-Encoding", "identity"), ("Connection", "close")]
    request = h11.Request(method="GET", target=target.path, headers=headers)
    writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    await writer.drain()
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(CHUNK_BYTES))
        elif isinstance(event, h11.Response):
            if location := _location(event):
                return location
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > max_bytes:
                raise RemoteError(f"it has more than {max_bytes} bytes; send a smaller picture")
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)


def _location(response: h11.Response) -> str | None:
    """Where a redirect leads; None for a picture. Raises RemoteError for anything else."""
    headers = {bytes(name): bytes(value).decode("latin-1") for name, value in response.headers}
    if response.status_code in REDIRECTS and b"location" in headers:
        return headers[b"location"]
    if response.status_code != 200:
        raise RemoteError(f"its host answered with status {response.status_code}; check the URL")
    if not headers.get(b"content-type", "").lower().startswith("image/"):
        raise RemoteError("its host does not call it a picture (Content-Type: image/...); check the URL")
    return None


def _problem(why: str, where: str) -> Problem:
    return Problem(400, "invalid_image_url", f"{where} cannot be fetched: {why}", where)
