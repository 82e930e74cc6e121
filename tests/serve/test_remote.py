"""Pictures by URL: what is fetched, and what a stranger's URL must not reach.

The web server of these tests is on 127.0.0.1, which they allow; 127.0.0.2 stands for the inside of the network.
"""

from __future__ import annotations

import asyncio
import http.server
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.serve.asking import file_of, picture
from vz_edge.serve import name_lookup, remote
from vz_edge.serve.problem import Problem
from vz_edge.serve.settings import RemoteLimits

PICTURE = file_of(picture(1))
LIMITS = RemoteLimits(max_bytes=10_000, total_sec=5.0, max_redirects=2)


class Web(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Host"]))  # type: ignore[attr-defined]
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/slow":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for _ in range(100):  # each byte in good time, the whole in none
                self.wfile.write(b"X")
                time.sleep(0.05)
        elif self.path == "/endless":
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x" * 1000)
        elif self.path == "/nonsense":
            self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        elif self.path == "/short":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 999\r\n\r\nabc")
        else:
            self.send_response({"/picture?a=b": 200, "/page": 200}.get(self.path, 404))
            self.send_header("Content-Type", "text/html" if self.path == "/page" else "image/png")
            self.end_headers()
            self.wfile.write(PICTURE)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.handle_error = lambda *arguments: None  # type: ignore[method-assign]
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def get(url: str, limits: RemoteLimits = LIMITS, open_address: str = "127.0.0.1") -> bytes:
    return asyncio.run(remote.fetch(url, limits, "here", lambda address: address == ipaddress.ip_address(open_address)))


def refusal(url: str, limits: RemoteLimits = LIMITS) -> str:
    with pytest.raises(Problem, match="here cannot be fetched") as raised:
        get(url, limits)
    assert (raised.value.status_code, raised.value.body.error.code) == (400, "invalid_image_url")
    return raised.value.body.error.message


def at(web: http.server.ThreadingHTTPServer, path: str) -> str:
    return f"http://127.0.0.1:{web.server_port}{path}"


def test_a_picture_comes(web: http.server.ThreadingHTTPServer) -> None:
    assert get(at(web, "/picture?a=b")) == PICTURE
    assert web.seen[-1] == ("/picture?a=b", f"127.0.0.1:{web.server_port}")  # type: ignore[attr-defined]


def test_redirects_are_followed_and_counted(web: http.server.ThreadingHTTPServer) -> None:
    assert get(at(web, "/to//picture?a=b")) == PICTURE
    assert get(at(web, f"/to/{at(web, '/picture?a=b')}")) == PICTURE
    assert "more than 2 times" in refusal(at(web, "/to//to//to//picture?a=b"))


@pytest.mark.parametrize(
    "inside",
    [
        "http://127.0.0.2:{port}/picture?a=b",
        "http://169.254.169.254/latest/meta-data",
        "//127.0.0.2:{port}/picture?a=b",
    ],
)
def test_a_redirect_cannot_lead_inside(web: http.server.ThreadingHTTPServer, inside: str) -> None:
    seen = len(web.seen)  # type: ignore[attr-defined]
    assert "not on the open internet" in refusal(at(web, "/to/" + inside.format(port=web.server_port)))
    assert len(web.seen) == seen + 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/a", "http://", "http://127.0.0.1:99999/"])
def test_a_redirect_must_stay_on_the_web(web: http.server.ThreadingHTTPServer, location: str) -> None:
    refusal(at(web, f"/to/{location}"))


def test_bounds(web: http.server.ThreadingHTTPServer) -> None:
    assert "more than 10000 bytes" in refusal(at(web, "/endless"))
    assert "status 404" in refusal(at(web, "/missing"))
    assert "not call it a picture" in refusal(at(web, "/page"))
    assert "does not speak HTTP" in refusal(at(web, "/nonsense"))
    assert "does not speak HTTP" in refusal(at(web, "/short"))
    started = time.monotonic()
    assert "longer than 0.3 s" in refusal(at(web, "/slow"), RemoteLimits(10_000, 0.3, 0))
    assert time.monotonic() - started < 4


def test_nobody_there_is_a_refusal() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "cannot be reached" in refusal(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0",
        "0.0.0.0",
        "169.254.169.254",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[fe80::1]",
        "[fd00::1]",
        "[ff02::1]",
    ],
)
def test_addresses_inside_are_never_asked(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    def connect(*arguments: object, **options: object) -> None:
        pytest.fail(f"a connection to {host} was begun")

    monkeypatch.setattr(asyncio, "open_connection", connect)
    with pytest.raises(Problem, match="open internet|host cannot be reached"):  # noqa: RUF043 (either)
        asyncio.run(remote.fetch(f"http://{host}/picture", LIMITS, "here"))


def named(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Let every host name have these addresses."""

    def entries(host: str, port: int, **options: object) -> list[object]:
        return [(0, 0, 0, "", (address, port)) for address in addresses]

    monkeypatch.setattr(name_lookup.socket, "getaddrinfo", entries)


def test_one_address_inside_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, "8.8.8.8", "10.0.0.1")
    with pytest.raises(Problem, match="open internet"):
        asyncio.run(remote.fetch("http://two.example/", LIMITS, "here"))


def test_every_address_is_tried_in_order_without_a_second_lookup(
    web: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, connect = [], asyncio.open_connection

    async def noted(host: str, *arguments: object, **options: object) -> object:
        tried.append(host)
        named(monkeypatch, "10.0.0.1")  # what the name means from now on
        if host == "127.0.0.3":
            await asyncio.sleep(60)
        return await connect(host, *arguments, **options)  # type: ignore[arg-type]

    named(monkeypatch, "127.0.0.2", "127.0.0.3", "127.0.0.1", "127.0.0.4")
    monkeypatch.setattr(asyncio, "open_connection", noted)
    limits = RemoteLimits(max_bytes=10_000, total_sec=30.0, connect_sec=0.2)
    url = f"http://many.example:{web.server_port}/picture?a=b"
    assert asyncio.run(remote.fetch(url, limits, "here", lambda address: True)) == PICTURE
    assert tried == ["127.0.0.2", "127.0.0.3", "127.0.0.1"]


def test_slow_names_leave_the_threads_of_all_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def slow(host: str, port: int, **options: object) -> list[object]:
        answered.wait(60)
        return []

    async def test() -> list[BaseException | bytes]:
        limits = RemoteLimits(lookup_sec=0.5)
        fetches = [
            asyncio.create_task(remote.fetch("http://slow.example/", limits, "here"))
            for _ in range(name_lookup.MOST_LOOKUPS + 1)
        ]
        for _ in range(64):  # more than the loop's own pool has
            await asyncio.wait_for(asyncio.to_thread(int), 10)
        return await asyncio.gather(*fetches, return_exceptions=True)

    monkeypatch.setattr(name_lookup.socket, "getaddrinfo", slow)
    try:
        *waited, refused = asyncio.run(test())
    finally:
        answered.set()
    for problem in waited:
        assert isinstance(problem, Problem) and problem.status_code == 400 and "within 0.5 s" in str(problem.detail)
    assert isinstance(refused, Problem) and (refused.status_code, refused.body.error.code) == (503, "lookups_busy")
    for _ in range(name_lookup.MOST_LOOKUPS):  # all places come back
        assert name_lookup._places.acquire(timeout=10)
    name_lookup._places.release(name_lookup.MOST_LOOKUPS)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a.png",
        "ftp://example.org/a.png",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "http://",
        "http:///a.png",
        "http://user:pass@example.org/",
        "http://example.org:99999/",
        "http://example.org:x/",
        "http://[::1/",
        "http://example.org/a b",
        "http://example.org/é",
        "http://example.org/\r\nHost: other",
    ],
)
def test_what_is_no_web_address_is_refused(url: str) -> None:
    refusal(url)
