"""A real server on loopback, asked by OpenAI's own client and by clients that break off."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serve.asking import PIECES, WAIT_SEC, ScriptedModel, content, data_url, file_of, picture, request, serving
from vz_edge.device.model import EdgeModel
from vz_edge.serve.engine import Engine
from vz_edge.serve.settings import Settings

REPOSITORY = Path(__file__).parents[2]
CLIENTS, ASKED_EACH = 8, 3
POST = "POST /v1/chat/completions HTTP/1.1\r\n"


def client_of(port: int, token: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, max_retries=0, timeout=WAIT_SEC)


def ask(client: openai.OpenAI, number: int, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": content("What?", data_url(file_of(picture(number))))}]
    return client.chat.completions.create(model="stand-in", messages=messages, max_tokens=6, **options)


def test_answers_are_not_mixed(engine: Engine, model: EdgeModel) -> None:
    """Every client has pictures of its own, at the same time; half of the answers are streamed."""
    message = {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}
    expected = [model.ask(picture(number), [message], max_new_tokens=6).text for number in range(CLIENTS * ASKED_EACH)]
    assert len(set(expected)) > CLIENTS

    def answers(port: int, first: int) -> list[str]:
        with client_of(port) as client:
            return [answer(client, number) for number in range(first, first + ASKED_EACH)]

    def answer(client: openai.OpenAI, number: int) -> str:
        if number % 2:
            return str(ask(client, number).choices[0].message.content)
        return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, number, stream=True))

    with serving(engine, Settings()) as port, ThreadPoolExecutor(CLIENTS) as pool:
        found = pool.map(lambda first: answers(port, first), range(0, CLIENTS * ASKED_EACH, ASKED_EACH))
        assert [text for texts in found for text in texts] == expected


def test_the_official_client_sees_errors_as_its_own(scripted_engine: Engine, scripted: ScriptedModel) -> None:
    with serving(scripted_engine, Settings(token="0123456789abcdef")) as port:
        with pytest.raises(openai.AuthenticationError):
            client_of(port, "wrong").models.list()
        client = client_of(port, "0123456789abcdef")
        assert [model.id for model in client.models.list()] == ["stand-in"]
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        with pytest.raises(openai.BadRequestError, match="leave it out"):
            ask(client, 1, n=2)
        with ThreadPoolExecutor(2) as pool:  # one is answered, one waits, and a third is one too many
            both = [pool.submit(ask, client, number) for number in range(2)]
            while len(scripted_engine._open) < 2:
                time.sleep(0.01)
            with pytest.raises(openai.RateLimitError) as raised:
                ask(client, 3)
            assert int(raised.value.response.headers["retry-after"]) >= 1
            scripted.let_go(2 * len(PIECES))
            assert [done.result().choices[0].message.content for done in both] == ["".join(PIECES)] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_connection_ends_the_answer(scripted_engine: Engine, scripted: ScriptedModel, stream: bool) -> None:
    body = json.dumps(request(stream=stream)).encode()
    head = f"{POST}Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with serving(scripted_engine, Settings()) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + body)
            assert scripted.started.acquire(timeout=WAIT_SEC)
        while not all(ticket.cancelled for ticket in scripted_engine._open):
            time.sleep(0.01)
        scripted.let_go(2)
        assert scripted.closed.acquire(timeout=WAIT_SEC)


@pytest.mark.parametrize(
    "raw",
    [
        f"{POST}Host: a\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}",
        f"{POST}Host: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}",
        f"{POST}Host: localhost\r\nContent-Length: -2\r\n\r\n{{}}",
        f"{POST}Host: localhost\r\nContent-Length: 2, 3\r\n\r\n{{}}",
        f"{POST}Host: localhost\r\nTransfer-Encoding: chunked, gzip\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n",
        f"{POST}Content-Length: 2\r\n\r\n{{}}",
        "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + "x" * 100_000,
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_ambiguous_requests_get_no_answer_but_a_refusal(engine: Engine, raw: str) -> None:
    """Two sizes, or two hosts, are what a proxy in front could read in another way."""
    with serving(engine, Settings()) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_SEC) as connection:
            connection.sendall(raw.encode("latin-1"))
            connection.shutdown(socket.SHUT_WR)
            status = connection.recv(4096).split(b"\r\n")[0]
        assert b" 4" in status[:13] or status == b""
        assert [model.id for model in client_of(port).models.list()] == ["stand-in"]


@contextlib.contextmanager
def process(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``vz-edge serve`` on a free port; gives the process and what it printed when it was ready."""
    command = [sys.executable, "-m", "vz_edge", "serve", str(bundle), "--port", "0", "--threads", "1", *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("VZ_EDGE_TOKEN", None)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdout is not None
            yield child, child.stdout.readline() + child.stdout.readline()
        finally:
            child.kill()


def test_sigterm_lets_answers_finish(bundle: Path, tmp_path: Path) -> None:
    """The command itself: it says how to ask, answers, and ends with status 0 when it is told to."""
    (tmp_path / "token").write_text("0123456789abcdef")
    with process(bundle, "--token-file", str(tmp_path / "token")) as (child, greeting):
        assert greeting.startswith("stand-in at http://127.0.0.1:") and "\ncurl http" in greeting
        assert "0123456789abcdef" not in greeting
        port = int(greeting.partition("127.0.0.1:")[2].partition("/")[0])
        chunks = iter(ask(client_of(port, "0123456789abcdef"), 1, stream=True, extra_body={"max_tokens": 200}))
        next(chunks)
        child.send_signal(signal.SIGTERM)
        rest = list(chunks)
        assert rest[-1].choices[0].finish_reason in ("stop", "length")
        assert child.wait(WAIT_SEC) == 0
        assert child.stderr is not None and "Traceback" not in child.stderr.read()
        with pytest.raises(openai.APIConnectionError):
            client_of(port).models.list()


def test_a_panic_of_native_code_ends_the_process_with_a_status_that_is_none_of_success(bundle: Path) -> None:
    script = (
        "import sys\n"
        "from vz_edge.device.cached_model import CachedModel\n"
        "class Panic(BaseException): pass\n"
        "def stream(*arguments, **options): raise Panic('native code gave up')\n"
        "CachedModel.stream = stream\n"
        "from vz_edge.cli import main\n"
        f"sys.argv[1:] = ['serve', {str(bundle)!r}, '--port', '0', '--threads', '1']\n"
        "main()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "VZ_EDGE_TOKEN"}
    command = [sys.executable, "-c", script]
    environment["PYTHONPATH"] = str(REPOSITORY)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdout is not None and child.stderr is not None
            greeting = child.stdout.readline()
            port = int(greeting.partition("127.0.0.1:")[2].partition("/")[0])
            with pytest.raises(openai.InternalServerError, match="has failed") as raised:
                ask(client_of(port), 1)
            assert raised.value.status_code == 503
            assert child.wait(WAIT_SEC) == 70
            assert "native code gave up" in child.stderr.read()
        finally:
            child.kill()
