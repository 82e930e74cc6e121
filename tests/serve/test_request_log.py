"""A request is one line in the log, and nothing in it is the client's own words."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.serve.asking import ScriptedModel, data_url, file_of, picture, request
from tests.serve.test_server import client_of, process
from vz_edge.serve.app import create_app
from vz_edge.serve.engine import Engine
from vz_edge.serve.settings import Settings

ANSWERED = re.compile(r"POST /v1/chat/completions 200 \d+\.\d{3} s; (\d+) of (\d+) prompt tokens cached, (\d+) written")
SECRET = "a question that is nobody's business"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "vz_edge.serve")
    return caplog


def client(engine: Engine, **settings: object) -> TestClient:
    return TestClient(create_app(engine, Settings(**settings)), "http://localhost", raise_server_exceptions=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_a_line_with_its_tokens(engine: Engine, lines: pytest.LogCaptureFixture, stream: bool) -> None:
    url = data_url(file_of(picture(1)))
    usage = client(engine).post("/v1/chat/completions", json=request(SECRET, url)).json()["usage"]
    assert client(engine).post("/v1/chat/completions", json=request(SECRET, url, stream=stream)).status_code == 200
    found = [ANSWERED.fullmatch(line) for line in lines.messages]
    assert len(found) == 2 and all(found)
    cached, prompt, written = map(int, found[1].groups())  # type: ignore[union-attr]
    assert (cached, prompt) == (usage["prompt_tokens"] - 1, usage["prompt_tokens"])
    assert written == usage["completion_tokens"]
    assert SECRET not in lines.text and url[-20:] not in lines.text


def test_what_is_refused_is_a_line_too(engine: Engine, lines: pytest.LogCaptureFixture) -> None:
    guarded = client(engine, token="0123456789abcdef")
    guarded.get("/v1/models?question=" + SECRET)
    guarded.get("/v1/models/a%0APOST%20/forged%20200", headers={"Authorization": "Bearer 0123456789abcdef"})
    guarded.get("/" + "x" * 5000, headers={"Authorization": "Bearer 0123456789abcdef"})
    guarded.post("/v1/chat/completions", json={}, headers={"Authorization": "Bearer 0123456789abcdef"})
    expected = [
        "GET /v1/models 401",
        "GET /v1/models/a%0APOST%20/forged%20200 404",
        "GET /xxx",
        "POST /v1/chat/completions 400",
    ]
    assert len(lines.messages) == 4
    for line, start in zip(lines.messages, expected, strict=True):
        assert line.startswith(start) and "\n" not in line and len(line) < 250
    assert SECRET not in lines.text and "0123456789abcdef" not in lines.text


def test_a_failure_is_a_line_beside_its_traceback(
    scripted_engine: Engine, scripted: ScriptedModel, lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripted, "stream", lambda *arguments, **options: 1 / 0)
    client(scripted_engine).post("/v1/chat/completions", json=request())
    assert re.fullmatch(r"POST /v1/chat/completions 500 \d+\.\d{3} s", lines.messages[-1])
    assert "ZeroDivisionError" in lines.text


@pytest.mark.parametrize("options", [(), ("-q",)])
def test_the_command_logs_on_stderr_unless_it_is_quiet(bundle: Path, options: tuple[str, ...]) -> None:
    with process(bundle, "--system", "Be brief.", *options) as (child, greeting):
        port = int(greeting.partition("127.0.0.1:")[2].partition("/")[0])
        reply = client_of(port).chat.completions.create(
            model="stand-in", messages=[{"role": "user", "content": SECRET}], max_tokens=2
        )
        assert reply.usage is not None and reply.usage.prompt_tokens > len(SECRET) + len("Be brief.")
        child.terminate()
        _, log = child.communicate()
    assert SECRET not in log
    assert len(ANSWERED.findall(log)) == (0 if options else 1)
    assert log.count("\n") == (0 if options else 1)
