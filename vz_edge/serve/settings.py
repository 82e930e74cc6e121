"""What a server is told when it starts, and what it must not be told."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from vz_edge.arguments import read_text
from vz_edge.errors import ServeError

TOKEN_VARIABLE = "VZ_EDGE_TOKEN"
SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class RemoteLimits:
    """Bounds of fetching pictures by URL: bytes of all in a request; seconds of each, its redirects included.

    ``lookup_sec`` is for a host's name, ``connect_sec`` for each address that it has; both are part of ``total_sec``.
    """

    max_bytes: int = 10 * 2**20
    total_sec: float = 10.0
    max_redirects: int = 3
    lookup_sec: float = 4.0
    connect_sec: float = 3.0


@dataclass(frozen=True)
class Settings:
    """Bounds of a request, and who may send one.

    ``token`` None means that nobody needs one, which is for loopback addresses alone. ``queue_length`` requests wait
    while one is answered. ``deadline_sec`` runs from a request's acceptance to the end of its answer, the wait in the
    queue included; ``body_sec`` is how long sending the body may take. ``max_pixels`` is for all pictures of a
    request together. ``remote`` None refuses pictures by URL. ``ui`` puts a page for people at ``/``. ``system`` is
    what the model is told first in conversations that have no system prompt of their own. Raises ServeError for what
    can admit no request.
    """

    token: str | None = field(default=None, repr=False)
    queue_length: int = 8
    deadline_sec: float = 300.0
    body_sec: float = 30.0
    max_body_bytes: int = 16 * 2**20
    max_pictures: int = 8
    max_pixels: int = 25_000_000
    max_prompt_chars: int = 100_000
    remote: RemoteLimits | None = None
    ui: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if self.queue_length < 0:
            raise ServeError(f"a queue of {self.queue_length} is impossible; expected 0 (nobody waits) or more")
        for name in ("deadline_sec", "body_sec", "max_body_bytes", "max_pictures", "max_pixels", "max_prompt_chars"):
            if not getattr(self, name) > 0:
                raise ServeError(f"{name} {getattr(self, name)} would refuse every request; expected more than 0")


def read_token(file: Path | None) -> str | None:
    """The token in ``file``, else in the environment's VZ_EDGE_TOKEN, else None.

    There is no option for the token itself: a command line can be read by every user of the machine. Raises
    ServeError.
    """
    if file is not None:
        try:
            token, source = read_text(file).strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"the token file {file} cannot be read ({error}); expected a text file") from error
    elif TOKEN_VARIABLE in os.environ:
        token, source = os.environ[TOKEN_VARIABLE].strip(), TOKEN_VARIABLE
    else:
        return None
    if len(token) < SHORTEST_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise ServeError(
            f"{source} holds no token: expected at least {SHORTEST_TOKEN} printable ASCII characters without spaces; "
            "write one with 'openssl rand -hex 32'"
        )
    return token


def check_exposure(host: str, token: str | None) -> None:
    """Raise ServeError where other machines could reach a server that asks for no token."""
    if token is None and not is_loopback(host):
        raise ServeError(
            f"{host} can be reached from other machines, so a token is needed; give --token-file or set "
            f"{TOKEN_VARIABLE}, or bind to 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address without a port, is this machine as seen from itself.

    Names are not resolved: whoever controls a name's DNS could make it mean anything.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
