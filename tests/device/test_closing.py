"""What is closed gives back its memory and says so in one line; what a reply holds can be written as JSON."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest

from tests.device import standin
from vz_edge.device.model import EdgeModel
from vz_edge.device.reply import Reply
from vz_edge.errors import RequestError
from vz_edge.watch import Frame

PICTURE = np.zeros((30, 40, 3), np.uint8)


@pytest.fixture
def own(bundle: Path) -> EdgeModel:
    """A model that a test may close."""
    return EdgeModel.load(bundle, threads=1)


def test_a_closed_model_gives_its_parts_back(own: EdgeModel) -> None:
    parts = [weakref.ref(part) for part in (own.decoder, own.vision, own.embedding)]
    session = own.session()
    session.look(PICTURE)
    branch = session.fork()
    cached = own.cached(10**6)
    cached.ask(PICTURE, "Why?", max_new_tokens=1)
    assert "Session: 1 picture(s), 0 turn(s)" in repr(session)
    with own as entered:
        assert entered is own and entered.ask(PICTURE, "Why?", max_new_tokens=1).answer_tokens == 1
    own.close()
    gc.collect()
    assert [part() for part in parts] == [None] * 3
    for call in (
        lambda: own.ask(PICTURE, "Why?"),
        lambda: own.stream(PICTURE, "Why?"),
        lambda: own.ask_many(PICTURE, ["Why?"]),
        lambda: own.encode(PICTURE),
        lambda: own.session(),
        lambda: own.watch([PICTURE], "Why?"),
        lambda: own.vision.tile(PICTURE),
        lambda: own.__enter__(),
        lambda: own.cached(10**6),
        lambda: cached.ask(PICTURE, "Why?"),
    ):
        with pytest.raises(RequestError, match="the model was closed; load it again"):
            call()
    for closed in (session, branch):
        for call in (
            lambda closed=closed: closed.ask("Why?"),
            lambda closed=closed: closed.look(PICTURE),
            lambda closed=closed: closed.fork(),
        ):
            with pytest.raises(RequestError, match="the session was closed; make another one of the model"):
                call()
    assert repr(own).endswith("closed>") and repr(session) == "<Session: closed>"


def test_an_answer_that_is_being_written_goes_on(own: EdgeModel) -> None:
    expected = own.ask(PICTURE, "Why?", max_new_tokens=8).text
    stream = own.stream(PICTURE, "Why?", max_new_tokens=8)
    begun = next(stream)
    own.close()
    assert begun + "".join(stream) == expected


def test_a_session_is_closed_alone(own: EdgeModel) -> None:
    with own.session() as session:
        session.ask("Why?", max_new_tokens=1)
    with pytest.raises(RequestError, match="the session was closed"):
        session.ask("Why?")
    assert own.ask(None, "Why?", max_new_tokens=1).answer_tokens == 1


def test_a_watch_of_a_closed_model_ends(own: EdgeModel) -> None:
    with own.watch([PICTURE] * 4, ["Why?"], max_context=200) as watch:
        next(watch)
        own.close()
        with pytest.raises(RequestError, match="the model was closed"):
            next(watch)
    assert repr(watch) == "<Watch: 1 question(s), closed>"


def reply_of(**more: object) -> Reply:
    fields = dict.fromkeys(("prompt_tokens", "image_tokens", "cached_tokens"), 3)
    seconds = dict.fromkeys(("preprocess_sec", "vision_sec", "prefill_sec", "decode_sec"), 0.5)
    return Reply("word " * 400, "stop", tuple(range(500)), **fields, **seconds, **more)  # type: ignore[arg-type]


def test_a_reply_can_be_written_as_json() -> None:
    pydantic = pytest.importorskip("pydantic", reason="a value may be a pydantic model")

    class Door(pydantic.BaseModel):
        open: bool

    reply = reply_of(value=Door(open=True), logprobs=(-0.5,) * 500, probabilities={"yes": 0.25, "no": 0.75})
    data = json.loads(json.dumps(reply.as_dict(), allow_nan=False))
    assert data["value"] == {"open": True} and data["probabilities"] == {"yes": 0.25, "no": 0.75}
    assert data["token_ids"] == list(range(500)) and len(data["logprobs"]) == 500
    assert (data["answer_tokens"], data["ttft_sec"], data["total_sec"]) == (500, 1.5, 2.0)
    assert {"text", "finish_reason", "decode_tokens_per_sec", "cached_tokens"} <= data.keys()


def test_answers_can_be_written_as_json(own: EdgeModel) -> None:
    for options in ({}, {"logprobs": True}, {"schema": ["yes", "no"]}):
        reply = own.ask(PICTURE, "Why?", max_new_tokens=4, **options)  # type: ignore[arg-type]
        assert json.loads(json.dumps(reply.as_dict()))["text"] == reply.text


def test_what_is_printed_fits_a_screen(own: EdgeModel) -> None:
    picture, session = own.encode(PICTURE), own.session()
    look = session.look(PICTURE)
    large = np.zeros((2000, 3000, 3), np.uint8)
    with own.watch([large], ["Why?"], max_context=200) as watch:
        (result,) = watch
    for value in (own, session, picture, look, watch, result, own.manifest, reply_of(), Frame(large)):
        assert len(repr(value)) < 1000 and "\n" not in repr(value), repr(value)
    assert repr(own) == f"<EdgeModel stand-in: llava_next, 16 bits, tokens 20, context {standin.CONTEXT}>"
    assert "features=float32[" in repr(picture) and "uint8[2000, 3000, 3]" in repr(Frame(large))
