"""The messages of OpenAI's specification: each form is answered, or refused by the path of what is to blame."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.device import standin
from tests.serve.asking import ScriptedModel, data_url, file_of, picture
from vz_edge.device.model import EdgeModel
from vz_edge.errors import RequestError
from vz_edge.serve.app import create_app
from vz_edge.serve.engine import Engine
from vz_edge.serve.settings import Settings

URL = data_url(file_of(picture(1)))
HI = {"role": "user", "content": "hi"}
TEXT = {"type": "text", "text": "hi"}
IMAGE = {"type": "image"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def text(words: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": words}]


def post(engine: Engine, messages: Any, **settings: Any) -> Any:
    client = TestClient(create_app(engine, Settings(**settings)), "http://localhost")
    body = {"model": "stand-in", "messages": messages, "max_tokens": 2}
    return client.post("/v1/chat/completions", json=body)


def asked(scripted: ScriptedModel, engine: Engine, messages: Any, **settings: Any) -> list[tuple[str, list]]:
    """Role and parts of each message that reaches the model."""
    scripted.let_go(10)
    response = post(engine, messages, **settings)
    assert response.status_code == 200, response.text
    return [(message["role"], message["content"]) for message in scripted.asked[-1][1]]


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        ({"role": "user", "content": "hi", "name": "bob"}, text("hi")),
        ({"role": "user", "content": [TEXT], "name": None}, text("hi")),
        ({"role": "user", "content": ""}, text("")),
        ({"role": "user", "content": [{"type": "image_url", "image_url": URL}, TEXT]}, [IMAGE, TEXT]),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]}, [IMAGE]),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL, "detail": "low"}}]}, [IMAGE]),
        ({"role": "assistant", "content": None}, text("")),
        ({"role": "assistant"}, text("")),
        ({"role": "assistant", "content": "yes", "name": "al", "refusal": None, "tool_calls": None}, text("yes")),
        ({"role": "assistant", "content": [TEXT, TEXT]}, [TEXT, TEXT]),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, text("no")),
        ({"role": "assistant", "content": None, "refusal": "no"}, text("no")),
        ({"role": "assistant", "content": "well,", "refusal": "no"}, [*text("well,"), *text("no")]),
        ({"role": "assistant", "content": "a", "audio": None, "function_call": None, "tool_calls": []}, text("a")),
        ({"role": "system", "content": "Be brief.", "name": "x"}, text("Be brief.")),
        ({"role": "developer", "content": [TEXT]}, [TEXT]),
    ],
)
def test_what_is_answered(
    scripted_engine: Engine, scripted: ScriptedModel, message: dict[str, Any], parts: list[dict[str, str]]
) -> None:
    found = asked(scripted, scripted_engine, [HI, message, HI])
    role = "system" if message["role"] == "developer" else message["role"]
    assert found == [("user", text("hi")), (role, parts), ("user", text("hi"))]


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"role": "user"}, "messages.1.content: "),
        ({"role": "user", "content": None}, "messages.1.content: expected a string, or a list of parts"),
        ({"role": "user", "content": 5}, "messages.1.content: expected a string, or a list of parts"),
        ({"role": "user", "content": TEXT}, "messages.1.content: expected a string, or a list of parts"),
        ({"role": "user", "content": []}, "messages.1.content: "),
        ({"role": "user", "content": ["hi"]}, "messages.1.content.0: "),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.1.content.0.text: "),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "messages.1.content.0.text: "),
        ({"role": "user", "content": [TEXT, {"type": "image_url"}]}, "messages.1.content.1.image_url: "),
        (
            {"role": "user", "content": [TEXT, {"type": "image_url", "image_url": 5}]},
            'messages.1.content.1.image_url: expected {"url": ...}, or the URL',
        ),
        (
            {"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {}}]},
            "messages.1.content.1.image_url.url: ",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL, "detail": "tiny"}}]},
            "messages.1.content.0.image_url.detail: ",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x.png"}]},
            "messages.1.content.0.image_url is ",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}]},
            "messages.1.content.0.image_url.url is ",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]},
            "messages.1.content.0.type: 'input_audio' is not supported here, expected 'text', 'image_url'",
        ),
        (
            {"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]},
            "messages.1.content.0.type: 'file' is not supported here",
        ),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}, "messages.1.content.0.type: "),
        ({"role": "user", "content": "hi", "name": 5}, "messages.1.name: "),
        ({"role": "user", "content": "hi", "nam": "x"}, "messages.1.nam is not known here"),
        ({"role": "system", "content": None}, "messages.1.content: "),
        ({"role": "system", "content": [{"type": "image_url", "image_url": URL}]}, "messages.1.content.0.type: "),
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": URL}]}, "messages.1.content.0.type: "),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            "messages.1.tool_calls: this server has nothing",
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": ""}},
            "messages.1.function_call: this server",
        ),
        ({"role": "assistant", "audio": {"id": "x"}}, "messages.1.audio: this server has nothing of the kind"),
        ({"role": "tool", "content": "5", "tool_call_id": "1"}, "messages.1.role: 'tool' is not supported here"),
        ({"role": "function", "content": "5", "name": "f"}, "messages.1.role: 'function' is not supported here"),
        ({"content": "hi"}, "messages.1"),
        ("hi", "messages.1"),
        (None, "messages.1"),
    ],
)
def test_what_is_refused_is_named(engine: Engine, message: Any, where: str) -> None:
    response = post(engine, [HI, message, HI])
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["message"].startswith(where), error["message"]
    assert "\n" not in error["message"] and len(error["message"]) < 300
    assert error["param"] in ("messages", where.split(" ")[0])


def test_an_answer_of_nothing_is_written_down_as_such(engine: Engine, model: EdgeModel) -> None:
    messages = [HI, {"role": "assistant", "content": None}, {"role": "user", "content": "so?"}]
    direct = model.ask(None, [HI, {"role": "assistant", "content": ""}, messages[2]], max_new_tokens=2)
    assert post(engine, messages).json()["choices"][0]["message"]["content"] == direct.text


def test_the_server_s_system_prompt_is_for_who_has_none(scripted_engine: Engine, scripted: ScriptedModel) -> None:
    first = ("system", text("Speak Latin."))
    question = ("user", text("hi"))
    assert asked(scripted, scripted_engine, [HI], system="Speak Latin.") == [first, question]
    for own in (SYSTEM, {**SYSTEM, "role": "developer"}):
        assert asked(scripted, scripted_engine, [own, HI], system="Speak Latin.") == [
            ("system", text("Be brief.")),
            question,
        ]
    assert asked(scripted, scripted_engine, [HI]) == [question]


def test_a_system_prompt_that_the_template_leaves_out_is_refused(model: EdgeModel) -> None:
    template = "{% for message in messages if message['role'] != 'system' %}" + standin.TEMPLATE.partition("%}")[2]
    parts = (model.manifest, model.vision, replace(model.chat, template=template), model.embedding, model.decoder)
    engine = Engine(EdgeModel(*parts, model.context_length, load_sec=0.0), queue_length=1, cache_bytes=0)
    with pytest.raises(RequestError, match="leaves a system prompt out"):
        create_app(engine, Settings(system="Be brief."))
    create_app(engine, Settings())
