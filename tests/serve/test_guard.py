"""Who may ask: tokens, Host headers, and addresses that a server without a token must not have."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from vz_edge.errors import ServeError
from vz_edge.metrics import Metrics
from vz_edge.serve.app import create_app
from vz_edge.serve.engine import Engine
from vz_edge.serve.guard import Guard
from vz_edge.serve.settings import TOKEN_VARIABLE, Settings, check_exposure, read_token

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8000", 200),
        ("127.9.9.9", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("0.0.0.0", 403),
        ("[::1", 403),
        ("[::1]evil", 403),
        ("", 403),
        ("é", 403),
    ],
)
def test_without_a_token_the_host_must_be_this_machine(engine: Engine, host: str, status: int) -> None:
    client = TestClient(create_app(engine, Settings()), "http://localhost")
    assert client.get("/v1/models", headers={"Host": host.encode()}).status_code == status  # type: ignore[dict-item]


def test_two_hosts_are_none(engine: Engine) -> None:
    client = TestClient(create_app(engine, Settings()), "http://localhost")
    assert client.get("/v1/models", headers=[("Host", "localhost"), ("Host", "localhost")]).status_code == 403


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN.upper()}",
        "Bearer é",
    ],
)
def test_a_wrong_token_gets_nowhere(engine: Engine, given: str | None) -> None:
    client = TestClient(create_app(engine, Settings(token=TOKEN)), "http://robot.example")
    headers = {} if given is None else {"Authorization": given.encode()}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("GET", "/no")):
        response = client.request(method, path, headers=headers)  # type: ignore[arg-type]
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/health").status_code == 200


def test_the_right_token_opens_under_any_name(engine: Engine) -> None:
    client = TestClient(create_app(engine, Settings(token=TOKEN)), "http://robot.example")
    assert client.get("/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.get("/v1/models", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
    twice = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", f"Bearer {TOKEN}")]
    assert client.get("/v1/models", headers=twice).status_code == 401


def test_no_page_of_another_site_is_let_in(engine: Engine) -> None:
    client = TestClient(create_app(engine, Settings()), "http://localhost")
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = client.options("/v1/chat/completions", headers=headers)
    assert preflight.status_code == 405
    assert not any(name.startswith("access-control") for name in preflight.headers)


@pytest.mark.parametrize(("begun", "status"), [(True, "200"), (False, "500")])
def test_a_response_that_breaks_off_is_counted_once(begun: bool, status: str) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("gone")

    metrics = Metrics()
    client = TestClient(Guard(broken, None, metrics), "http://localhost", raise_server_exceptions=False)
    client.get("/")
    assert metrics.as_dict() == {f'vz_edge_serve_responses_total{{status="{status}"}}': 1}


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "of-the-environment")
    assert read_token(None) == "of-the-environment"
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(tmp_path / "token") == TOKEN
    assert TOKEN not in repr(Settings(token=TOKEN))


@pytest.mark.parametrize(
    "text", ["", "short", "with spaces in between it", "0123456789abcdé-", "0123456789\n0123456789"]
)
def test_what_is_no_token_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(ServeError, match="holds no token") as raised:
        read_token(tmp_path / "token")
    assert not text or text not in str(raised.value)
    with pytest.raises(ServeError, match="cannot be read"):
        read_token(tmp_path / "missing")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "robot.local", ""])
def test_the_open_needs_a_token(host: str) -> None:
    with pytest.raises(ServeError, match="a token is needed"):
        check_exposure(host, None)
    check_exposure(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    check_exposure(host, None)


@pytest.mark.parametrize("bounds", [{"queue_length": -1}, {"max_pixels": 0}, {"deadline_sec": float("nan")}])
def test_bounds_that_admit_nothing_are_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(ServeError):
        Settings(**bounds)  # type: ignore[arg-type]
