"""Looking up the addresses of a host that a stranger named, without waiting where others must not.

A resolver may take half a minute over a name whose servers do not answer, and nothing can interrupt it. In the event
loop's own pool of threads a few such names would hold up all that needs a thread. Here each lookup has a thread of its
own that nobody waits for, MOST_LOOKUPS of them at once: the next one is refused at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading

from vz_edge.serve.addresses import Address
from vz_edge.serve.problem import Problem

MOST_LOOKUPS = 8

_places = threading.BoundedSemaphore(MOST_LOOKUPS)


async def look_up(host: str, port: int) -> list[Address]:
    """The addresses of a host, in the order that the system would try them.

    Raises Problem 503 where too many lookups hang, OSError where there is no such name, and ValueError.
    """
    if not _places.acquire(blocking=False):
        raise Problem(
            503,
            "lookups_busy",
            f"{MOST_LOOKUPS} host names are being looked up; send the picture itself as a data URL, or try again later",
            headers={"Retry-After": "10"},
        )
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[Address]] = loop.create_future()

    def settle(addresses: list[Address] | None, error: Exception | None) -> None:
        if not found.done():
            found.set_exception(error) if error else found.set_result(addresses or [])

    def work() -> None:
        addresses, error = None, None
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(ipaddress.ip_address(entry[4][0]) for entry in entries))
        except Exception as raised:  # OSError, UnicodeError; a name is a stranger's
            error = raised
        finally:
            _places.release()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, addresses, error)

    try:
        threading.Thread(target=work, name="vz-edge name lookup", daemon=True).start()
    except RuntimeError:
        _places.release()
        raise
    return await found
