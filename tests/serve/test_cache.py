"""What the server remembers: never another answer, whatever came before, and as much as it tells."""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.device import standin
from tests.device.test_session import encodings, varied
from tests.serve.asking import WAIT_SEC, content, data_url, file_of, picture, serving
from vz_edge.device.model import EdgeModel
from vz_edge.errors import AnswerError
from vz_edge.serve.app import create_app
from vz_edge.serve.engine import Engine
from vz_edge.serve.pictures import decode
from vz_edge.serve.settings import Settings

CONVERSATION_BYTES = 256 * standin.HIDDEN * 4
FILES = [file_of(picture(seed, (60, 40))) for seed in range(3)]
JPEG = file_of(picture(3), "JPEG")


@pytest.fixture(scope="module")
def exact(model: EdgeModel) -> EdgeModel:
    """The stand-in with a decoder that sums in the same order, in how many pieces it may be read."""
    return varied(model)


@pytest.fixture
def engine(exact: EdgeModel) -> Iterator[Engine]:
    engine = Engine(exact, queue_length=16, cache_bytes=20 * CONVERSATION_BYTES)
    engine.start()
    yield engine
    assert engine.stop(WAIT_SEC)


@pytest.fixture
def client(engine: Engine) -> TestClient:
    return TestClient(create_app(engine, Settings(ui=True)), "http://localhost")


def body_of(messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return {"model": "stand-in", "messages": messages, "max_tokens": 6, **fields}


def shown(text: str, file: bytes) -> dict[str, Any]:
    return {"role": "user", "content": content(text, data_url(file))}


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def answer_of(response: Any) -> tuple[str, dict[str, Any]]:
    """Text and usage of an answer, whole or streamed."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("application/json"):
        whole = response.json()
        return whole["choices"][0]["message"]["content"], whole["usage"]
    *events, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event[6:]) for event in events]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    return text, chunks[-1]["usage"]


def ask(client: TestClient, messages: list[dict[str, Any]], **fields: Any) -> tuple[str, dict[str, Any]]:
    return answer_of(client.post("/v1/chat/completions", json=body_of(messages, **fields)))


def metric(client: TestClient, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def fresh(model: EdgeModel, messages: list[dict[str, Any]], **options: Any) -> Any:
    """What a model that has read nothing answers."""
    pictures, plain = [], []
    for message in messages:
        parts = message["content"]
        if not isinstance(parts, str):
            urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
            pictures += [decode(FILES[[data_url(file) for file in FILES].index(url)]) for url in urls]
            parts = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
        plain.append({"role": message["role"], "content": parts})
    return model.ask(pictures, plain, max_new_tokens=6, **options)


@pytest.mark.parametrize(
    "fields", [{}, {"stream": True, "stream_options": {"include_usage": True}}], ids=["whole", "stream"]
)
def test_a_second_turn_reads_only_what_is_new(client: TestClient, exact: EdgeModel, fields: dict[str, Any]) -> None:
    messages = [said("system", "Be brief."), shown("What is this?", FILES[0])]
    text, first = ask(client, messages, **fields)
    assert text == fresh(exact, messages).text
    messages += [said("assistant", text), said("user", "And that?")]
    text, second = ask(client, messages, **fields)
    assert text == fresh(exact, messages).text
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert first["prompt_tokens"] <= cached < second["prompt_tokens"]
    assert metric(client, "vz_edge_serve_cached_tokens_total") == cached
    read = metric(client, 'vz_edge_serve_tokens_total{kind="prompt"}') + metric(
        client, 'vz_edge_serve_tokens_total{kind="image"}'
    )
    assert read == first["prompt_tokens"] + second["prompt_tokens"]
    assert 0 < metric(client, "vz_edge_serve_cache_bytes ") <= 20 * CONVERSATION_BYTES


def test_the_page_and_its_questions_look_once(
    client: TestClient, exact: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with encodings(exact, monkeypatch) as seen:
        first, again = (client.post("/ui/look", json={"picture": data_url(JPEG)}).json() for _ in range(2))
        assert len(seen) == 1
        for question in ("What is this?", "Who is there?"):
            _, usage = ask(client, [shown(question, JPEG)])
            assert usage["prompt_tokens_details"]["image_tokens"] == first["image_tokens"]
    assert len(seen) == 1
    for name in ("tiles", "grid", "image_tokens"):
        assert first[name] == again[name]


def test_the_same_pixels_are_the_same_picture(
    client: TestClient, exact: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    question, image = "What is this? " * 3, decode(JPEG)
    with encodings(exact, monkeypatch) as seen:
        ask(client, [shown(question, JPEG)])
        _, usage = ask(client, [shown(question, file_of(image))])
    assert len(seen) == 1
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_a_client_that_goes_in_the_midst_of_an_answer_spoils_nothing(engine: Engine, exact: EdgeModel) -> None:
    messages = [shown("What is this?", FILES[0])]
    body = json.dumps(body_of(messages, stream=True, max_tokens=2000)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(engine, Settings()) as port:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            while engine._open:
                time.sleep(0.01)
            text, usage = post(port, body_of(messages))
            assert text == fresh(exact, messages).text
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_an_answer_that_was_cut_off_spoils_nothing(client: TestClient, engine: Engine, exact: EdgeModel) -> None:
    messages = [shown("What is this?", FILES[1])]
    hasty = TestClient(create_app(engine, Settings(deadline_sec=0.05)), "http://localhost")
    for _ in range(2):
        late = hasty.post("/v1/chat/completions", json=body_of(messages, max_tokens=3000))
        assert late.status_code in (200, 504)  # the fake decoder may be that fast
        schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "string", "minLength": 50}}}
        broken = client.post("/v1/chat/completions", json=body_of(messages, response_format=schema))
        assert broken.status_code == 400
        assert ask(client, messages)[0] == fresh(exact, messages).text


def post(port: int, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SEC)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        told = json.loads(response.read())
    assert response.status == 200, told
    return told["choices"][0]["message"]["content"], told["usage"]


@pytest.mark.parametrize("conversations", [0, 4, 40])
def test_conversations_of_many_clients_are_answered_as_by_a_fresh_model(exact: EdgeModel, conversations: int) -> None:
    """Clients at once, each with conversations in turn that begin alike, fork, and have schemas and pictures."""
    pytest.importorskip("llguidance")
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [True, None]}}}
    engine = Engine(exact, queue_length=16, cache_bytes=conversations * CONVERSATION_BYTES)
    engine.start()

    def converse(seed: int, port: int) -> int:
        chance, cached = random.Random(seed), 0
        courses: list[list[dict[str, Any]]] = [[], [], []]
        for _ in range(12):
            number = chance.randrange(3)
            messages = list(courses[number])
            if not messages and chance.random() < 0.5:
                messages.append(said("system", chance.choice(["Be brief.", "Answer in one word, and in no more."])))
            text = chance.choice(["What is this?", "What is that?", "Why is that so? " * 8])
            messages.append(shown(text, chance.choice(FILES)) if chance.random() < 0.5 else said("user", text))
            asked = {"response_format": schema} if chance.random() < 0.25 else {}
            options = {"schema": schema["json_schema"]["schema"]} if asked else {}  # type: ignore[index]
            answer, usage = post(port, body_of(messages, **asked))
            assert answer == fresh(exact, messages, **options).text
            details = usage["prompt_tokens_details"]
            assert 0 <= details["cached_tokens"] < usage["prompt_tokens"]
            cached += details["cached_tokens"]
            courses[chance.randrange(3) if chance.random() < 0.3 else number] = [*messages, said("assistant", answer)]
        return cached

    with serving(engine, Settings()) as port, ThreadPoolExecutor(4) as pool:
        cached = list(pool.map(converse, range(4), [port] * 4))
    assert engine.stop(WAIT_SEC)
    assert engine.metrics.as_dict()["vz_edge_serve_cached_tokens_total"] == sum(cached)
    assert (sum(cached) > 0) == (conversations > 0)


def test_a_broken_schema_is_told_with_memory_too(client: TestClient, exact: EdgeModel) -> None:
    messages = [said("user", "What is this, and why is it there?")]
    ask(client, messages)
    with pytest.raises(AnswerError) as raised:
        fresh(exact, messages, schema={"type": "string", "minLength": 50})
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "string", "minLength": 50}}}
    response = client.post("/v1/chat/completions", json=body_of(messages, response_format=schema))
    assert response.json()["error"]["message"] == str(raised.value)
