"""The routes as a client sees them: answers, streams, and what is refused with which status."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.serve.asking import PIECES, ScriptedModel, content, data_url, file_of, picture, request
from vz_edge.device.model import EdgeModel
from vz_edge.errors import AnswerError, ImageError, VzEdgeError
from vz_edge.serve.app import create_app
from vz_edge.serve.engine import Engine
from vz_edge.serve.settings import Settings

SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}


def client_of(engine: Engine, **settings: Any) -> TestClient:
    return TestClient(create_app(engine, Settings(**settings)), "http://localhost", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(engine: Engine) -> TestClient:
    return client_of(engine)


def ask(client: TestClient, body: Any, **options: Any) -> Any:
    return client.post("/v1/chat/completions", json=body, **options)


def error_of(response: Any) -> tuple[int, str | None, str | None]:
    """Status, code and param, of a body that must be OpenAI's."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    return response.status_code, error["code"], error["param"]


def events_of(response: Any) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_an_answer_is_the_models_own(client: TestClient, model: EdgeModel) -> None:
    image = picture(1)
    body = ask(client, request("What?", data_url(file_of(image)))).json()
    direct = model.ask(
        image, [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}], max_new_tokens=6
    )
    assert body["choices"][0]["message"] == {"role": "assistant", "content": direct.text, "refusal": None}
    assert body["choices"][0]["finish_reason"] == direct.finish_reason
    assert body["usage"]["prompt_tokens"] == direct.prompt_tokens + direct.image_tokens
    assert body["usage"]["completion_tokens"] == direct.answer_tokens
    assert body["usage"]["prompt_tokens_details"]["image_tokens"] == direct.image_tokens
    assert (body["object"], body["model"]) == ("chat.completion", "stand-in")


def test_a_conversation_keeps_its_order_and_pictures(client: TestClient, model: EdgeModel) -> None:
    images = [picture(2), picture(3)]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": content("A?", data_url(file_of(images[0])))},
        {"role": "assistant", "content": "b", "refusal": None, "annotations": []},
        {"role": "user", "content": content("C?", data_url(file_of(images[1])))},
    ]
    direct = model.ask(
        images,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "A?"}, {"type": "image"}]},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": [{"type": "text", "text": "C?"}, {"type": "image"}]},
        ],
        max_new_tokens=6,
    )
    body = ask(client, {"model": "stand-in", "messages": messages, "max_completion_tokens": 6}).json()
    assert body["choices"][0]["message"]["content"] == direct.text
    assert body["usage"]["prompt_tokens"] == direct.prompt_tokens + direct.image_tokens


def test_a_stream_is_the_same_answer_in_pieces(client: TestClient) -> None:
    asked = request("What?", data_url(file_of(picture(4))), logprobs=True)
    whole = ask(client, asked).json()
    *chunks, usage, done = events_of(ask(client, {**asked, "stream": True, "stream_options": {"include_usage": True}}))
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    # What is read in pieces is summed in another order: the last digits differ.
    streamed, at_once = (
        [token["logprob"] for token in end["choices"][0]["logprobs"]["content"]] for end in (chunks[-1], whole)
    )
    assert streamed == pytest.approx(at_once, abs=1e-4)
    assert usage["choices"] == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage["usage"][name] == whole["usage"][name]
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1


def test_no_usage_unless_asked_for(client: TestClient) -> None:
    events = events_of(ask(client, request(stream=True)))
    assert all(event["usage"] is None and event["choices"] for event in events[:-1])


def test_logprobs_are_the_models(client: TestClient, model: EdgeModel) -> None:
    logprobs = ask(client, request(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    direct = model.ask(None, "What?", max_new_tokens=6, logprobs=True)
    assert direct.logprobs is not None
    assert [token["logprob"] for token in logprobs] == pytest.approx(list(direct.logprobs))


def test_options_reach_the_model(scripted_engine: Engine, scripted: ScriptedModel) -> None:
    scripted.let_go(10)
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    fields = {"temperature": 1, "top_p": 0.5, "seed": -1, "stop": "x", "response_format": form, "n": 1, "user": "me"}
    assert ask(client_of(scripted_engine), request(**fields)).status_code == 200
    _, _, options = scripted.asked[-1]
    assert 0 < options.pop("deadline_sec") <= Settings().deadline_sec
    assert options == {
        "max_new_tokens": 6,
        "temperature": 1.0,
        "top_p": 0.5,
        "seed": 2**64 - 1,
        "stop": ["x"],
        "logprobs": False,
        "schema": SCHEMA,
    }


def test_a_schema_is_followed(client: TestClient) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    response = ask(client, request(response_format=form, max_tokens=20))
    assert json.loads(response.json()["choices"][0]["message"]["content"])["n"] in (1, 2)
    assert error_of(ask(client, request(response_format=form, max_tokens=2)))[:2] == (400, "answer_breaks_schema")
    guided = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"x-guidance": 5}}}
    assert error_of(ask(client, request(response_format=guided)))[:2] == (400, "invalid_value")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
        ({"logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias"),
        ({"presence_penalty": 0.1}, "unsupported_parameter", "presence_penalty"),
        ({"frequency_penalty": -0.1}, "unsupported_parameter", "frequency_penalty"),
        ({"top_logprobs": 3}, "unsupported_parameter", "top_logprobs"),
        ({"reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
        ({"max_tokenz": 5}, "unknown_parameter", "max_tokenz"),
        ({"max_tokens": "5"}, "invalid_value", "max_tokens"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": 5}, "invalid_value", "max_completion_tokens"),
        ({"temperature": 2.5}, "invalid_value", "temperature"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_request", None),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "invalid_request", None),
        (
            {"response_format": {"type": "json_schema"}},
            "missing_required_parameter",
            "response_format",
        ),
        ({"max_tokens": 5000}, "context_length_exceeded", "messages"),
    ],
)
def test_what_cannot_be_done_is_refused(
    client: TestClient, fields: dict[str, Any], code: str, param: str | None
) -> None:
    assert error_of(ask(client, request(**fields))) == (400, code, param)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "tools": [], "tool_choice": "none", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"modalities": ["text"], "top_logprobs": 0, "user": "me", "metadata": {"a": "b"}, "store": False},
        {
            "n": None,
            "tools": None,
            "seed": None,
            "stop": None,
            "temperature": None,
            "response_format": {"type": "text"},
        },
    ],
)
def test_what_changes_nothing_is_taken(client: TestClient, fields: dict[str, Any]) -> None:
    assert ask(client, request(**fields)).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"model": "stand-in"}', b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 100_000],
)
def test_what_is_no_request_is_refused(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert error_of(response)[0] == 400


def test_another_model_is_not_here(client: TestClient) -> None:
    assert error_of(ask(client, request(model="gpt-4o"))) == (404, "model_not_found", "model")
    assert error_of(client.get("/v1/models/gpt-4o")) == (404, "model_not_found", "model")


def test_models_health_metrics(client: TestClient) -> None:
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["stand-in"]
    assert client.get("/v1/models/stand-in").json() == models[0]
    assert client.get("/health").json() == {"status": "ok"}
    assert ask(client, request()).status_code == 200
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    counted = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    assert float(counted["vz_edge_serve_admitted_total"]) == float(counted["vz_edge_serve_finished_total"]) > 0
    assert float(counted['vz_edge_serve_responses_total{status="200"}']) >= 5


def test_no_route_and_no_method_speak_openai_too(client: TestClient) -> None:
    assert error_of(client.get("/v1/nothing"))[0] == 404
    response = client.get("/v1/chat/completions")
    assert error_of(response)[0] == 405
    assert response.headers["allow"] == "POST"


def test_json_must_be_declared(client: TestClient) -> None:
    """A page on another site can send anything but this without being asked first."""
    for declared in ("text/plain", "application/x-www-form-urlencoded", "", "application/json+x"):
        response = client.post(
            "/v1/chat/completions", content=json.dumps(request()), headers={"Content-Type": declared}
        )
        assert error_of(response)[:2] == (415, "unsupported_media_type")
    packed = ask(client, request(), headers={"Content-Encoding": "gzip"})
    assert error_of(packed)[:2] == (415, "unsupported_media_type")
    assert ask(client, request(), headers={"Content-Type": "application/json; charset=utf-8"}).status_code == 200


def test_a_body_is_counted_whatever_its_length_says(engine: Engine) -> None:
    client = client_of(engine, max_body_bytes=1000)
    large = json.dumps(request("x" * 1000)).encode()
    json_type = {"Content-Type": "application/json"}
    whole = client.post("/v1/chat/completions", content=large, headers=json_type)
    assert error_of(whole)[:2] == (413, "body_too_large")
    chunked = client.post("/v1/chat/completions", content=iter([large[:600], large[600:]]), headers=json_type)
    assert error_of(chunked)[:2] == (413, "body_too_large")
    lying = client.post("/v1/chat/completions", content=large, headers={**json_type, "Content-Length": "5"})
    assert error_of(lying)[:2] == (413, "body_too_large")
    huge = client.post("/v1/chat/completions", content=b"{}", headers={**json_type, "Content-Length": "9" * 5000})
    assert error_of(huge)[:2] == (413, "body_too_large")
    assert ask(client, request()).status_code == 200


def test_bounds_of_a_request(engine: Engine) -> None:
    url = data_url(file_of(picture(5, (40, 30))))
    assert error_of(ask(client_of(engine, max_prompt_chars=4), request()))[:2] == (400, "string_above_max_length")
    assert error_of(ask(client_of(engine, max_pictures=1), request("?", url, url)))[:2] == (400, "too_many_images")
    assert ask(client_of(engine, max_pixels=2400), request("?", url, url)).status_code == 200
    assert error_of(ask(client_of(engine, max_pixels=2399), request("?", url, url)))[:2] == (413, "image_too_large")


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://example.org/a.png", "invalid_image_url"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("data:text/plain;base64,aGk=", "invalid_image_url"),
        ("data:image/png,abc", "invalid_image_url"),
        ("data:image/png;base64", "invalid_image_url"),
        ("data:image/png;base64,a", "invalid_base64"),
        ("data:image/png;base64,é", "invalid_base64"),
        ("data:image/png;base64,", "invalid_image"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n"), "invalid_image"),
        (data_url(file_of(picture(6))[:100]), "invalid_image"),
    ],
)
def test_what_is_no_picture_is_refused(client: TestClient, url: str, code: str) -> None:
    assert error_of(ask(client, request("?", url)))[:2] == (400, code)


def test_the_image_token_cannot_be_smuggled_in(client: TestClient) -> None:
    """Written by a user it is seven characters, beside a picture too."""
    plain = ask(client, request("what is this?")).json()["usage"]
    written = ask(client, request("what is <image> this?")).json()["usage"]
    assert written["prompt_tokens"] == plain["prompt_tokens"] + len("<image> ")
    assert written["prompt_tokens_details"]["image_tokens"] == 0
    url = data_url(file_of(picture(7)))
    shown = ask(client, request("what is <image> this?", url)).json()["usage"]["prompt_tokens_details"]
    assert (
        shown["image_tokens"] == ask(client, request("?", url)).json()["usage"]["prompt_tokens_details"]["image_tokens"]
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [(ImageError("no"), 400), (AnswerError("no"), 400), (VzEdgeError("secret"), 500), (KeyError("secret"), 500)],
)
def test_errors_before_the_first_piece_are_in_the_status(
    scripted_engine: Engine, scripted: ScriptedModel, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(scripted, "stream", fail)
    for stream in (False, True):
        response = ask(client_of(scripted_engine), request(stream=stream))
        assert error_of(response)[0] == status
        assert "secret" not in response.text


def test_an_error_in_the_midst_is_the_last_event(
    scripted_engine: Engine, scripted: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        yield "one"
        raise KeyError("secret")

    from vz_edge.device.reply import Stream

    monkeypatch.setattr(scripted, "stream", lambda *arguments, **options: Stream(broken()))
    *chunks, last = events_of(ask(client_of(scripted_engine), request(stream=True)))
    assert chunks[-1]["choices"][0]["delta"] == {"content": "one"}
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(last)


def test_the_deadline_is_a_504(scripted_engine: Engine, scripted: ScriptedModel) -> None:
    client = client_of(scripted_engine, deadline_sec=0.2)
    assert error_of(ask(client, request()))[:2] == (504, "deadline_exceeded")
    scripted.let_go(1)  # the worker sees at its next piece that nobody waits
    scripted.closed.acquire(timeout=5)
    scripted.let_go(1)
    *chunks, last = events_of(ask(client, request(stream=True)))
    assert chunks[-1]["choices"][0]["delta"] == {"content": PIECES[0]}
    assert last["error"]["code"] == "deadline_exceeded"


def test_errors_repeat_no_more_than_a_piece_of_the_request(client: TestClient) -> None:
    long = "é" * 100_000
    message = {"role": "user", "content": "What?"}
    bodies: list[Any] = [
        request(**{long: 1}),
        {**request(), "model": long},
        {**request(), "messages": [{"role": long, "content": "What?"}]},
        {**request(), "messages": [{**message, long: 1}]},
        {**request(), "messages": [{"role": "user", "content": [{"type": long, "text": "What?"}]}]},
        request("What?", f"data:image/{long},{long}"),
        request("What?", f"http://{long}/"),
        request(temperature=long),
        request(stream_options={long: True}),
        request(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": long}}}),
        request(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {long: 1, "not": {}}}}),
        request(response_format={"type": "json_schema", "json_schema": {"name": long, "schema": {}}}),
    ]
    for body in bodies:
        response = ask(client, body)
        assert response.status_code in (400, 404) and len(response.content) < 2500
    for response in (client.get(f"/{long[:10_000]}"), client.get(f"/v1/models/{long[:10_000]}")):
        assert response.status_code == 404 and len(response.content) < 2500


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 99999989},
        {
            "$defs": {
                **{
                    f"A{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/A{i + 1}"}}} for i in range(1000)
                },
                "A1000": {"type": "null"},
            },
            "$ref": "#/$defs/A0",
        },
        {"type": "string", "allOf": [{"pattern": f"(a|b)*{'ab'[i % 2]}(a|b){{{24 + i}}}"} for i in range(30)]},
    ],
)
def test_no_schema_takes_the_server_from_the_next_question(client: TestClient, schema: dict[str, Any]) -> None:
    asked = request(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    assert ask(client, asked).status_code == 400
    assert ask(client, request()).status_code == client.get("/health").status_code == 200
