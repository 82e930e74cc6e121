"""An answer to a schema is always one: valid, parsed, or an error that says what was missing."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.device import standin
from tests.device.test_choices import sentencepiece
from tests.device.test_model import PICTURE, QUESTIONS
from tests.device.test_session import assistant, user, varied
from vz_edge import Lark
from vz_edge.device.fake_decoder import FakeContext, FakeDecoder
from vz_edge.device.guide import GrammarCompiler, grammar_source
from vz_edge.device.model import EdgeModel
from vz_edge.device.prompt import messages_of
from vz_edge.errors import AnswerError, DependencyError, RequestError

SCENE = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["shape", "count"],
    "additionalProperties": False,
}


class Scene(pydantic.BaseModel):
    shape: str = pydantic.Field(max_length=5)
    crowded: bool


class Picky(pydantic.BaseModel):
    crowded: bool

    @pydantic.field_validator("crowded")
    @classmethod
    def never(cls, value: bool) -> bool:
        raise ValueError("it is never\nright")


def extended(leaves: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    return st.one_of(
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, leaves, st.integers(0, 2)),
        st.builds(
            lambda properties, optional: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[optional:],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "é", 'two "words"', ""]), leaves, min_size=1, max_size=3),
            st.integers(0, 1),
        ),
        st.lists(leaves, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    )


SCHEMAS = st.recursive(
    st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "number"}, {"const": "ö\n"}]),
        st.lists(st.sampled_from(["a", "ab", " a", 1, -2.5, None, True]), min_size=1, max_size=3, unique=True).map(
            lambda values: {"enum": values}
        ),
        st.builds(
            lambda least, more: {"type": "integer", "minimum": least, "maximum": least + more},
            st.integers(-200, 200),
            st.integers(0, 300),
        ),
        st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 4)),
    ),
    extended,
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(SCHEMAS, st.sampled_from([0.0, 1.0]), st.integers(0, 1000))
def test_any_json_schema_gives_valid_json_or_says_that_it_ran_out_of_tokens(
    model: EdgeModel, schema: dict, temperature: float, seed: int
) -> None:
    random = varied(model, decoder=FakeDecoder(standin.HIDDEN, standin.VOCAB, seed))
    try:
        reply = random.ask(None, "?", schema=schema, max_new_tokens=80, temperature=temperature, seed=seed)
    except AnswerError as error:
        assert str(error).startswith("max_new_tokens 80 ended the answer")
        return
    assert reply.value == json.loads(reply.text)
    jsonschema.validate(reply.value, schema)
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_kind_of_schema_has_its_value(model: EdgeModel, temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "seed": 1, "max_new_tokens": 100}
    reply = model.ask(PICTURE, QUESTIONS[0], schema=SCENE, **options)
    jsonschema.validate(reply.value, SCENE)
    assert reply.text == json.dumps(reply.value)
    scene = model.ask(PICTURE, QUESTIONS[0], schema=Scene, **options)
    assert isinstance(scene.value, Scene)
    assert json.loads(scene.text) == scene.value.model_dump()
    number = model.ask(PICTURE, QUESTIONS[0], schema=re.compile(r"[0-9]{3}/[ab]"), **options)
    assert number.text == number.value
    assert re.fullmatch(r"[0-9]{3}/[ab]", number.value)
    lark = model.ask(PICTURE, QUESTIONS[0], schema=Lark('start: word "," word\nword: /[a-z]{2}/'), **options)
    assert lark.text == lark.value
    assert re.fullmatch("[a-z]{2},[a-z]{2}", lark.value)
    assert model.ask(PICTURE, QUESTIONS[0], max_new_tokens=3).value is None


@pytest.mark.parametrize("pattern", [" x", "  ?y{2}", "\nz", "é{3}", "", '"', "[/\\\\]", "(?s:.)", "x|xy|xyz"])
@pytest.mark.parametrize("seed", range(3))
def test_the_text_is_exactly_what_the_grammar_read(model: EdgeModel, pattern: str, seed: int) -> None:
    random = varied(model, decoder=FakeDecoder(standin.HIDDEN, standin.VOCAB, seed))
    stream = random.stream(None, "?", schema=re.compile(pattern), max_new_tokens=20)
    text = "".join(stream)
    assert re.fullmatch(pattern, text)
    assert text == stream.reply.text == stream.reply.value


def test_flags_that_mean_the_same_here_are_kept_and_others_refused(model: EdgeModel) -> None:
    either = re.compile("a", re.IGNORECASE)
    letters = {model.ask(None, "?", schema=either, temperature=9.0, seed=seed).value for seed in range(12)}
    assert letters == {"a", "A"}
    with pytest.raises(RequestError, match="VERBOSE"):
        model.stream(None, "?", schema=re.compile("a b", re.VERBOSE))


class CountingDecoder(FakeDecoder):
    """Remembers how many tokens each call read."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.read: list[int] = []

    def start(self, capacity: int) -> FakeContext:
        return CountingContext(self, capacity)


class CountingContext(FakeContext):
    def append(self, embeds: np.ndarray) -> np.ndarray:
        decoder: Any = self._decoder
        decoder.read.append(len(embeds))
        return super().append(embeds)


def test_what_the_schema_forces_is_read_at_once(model: EdgeModel) -> None:
    decoder = CountingDecoder(standin.HIDDEN, standin.VOCAB)
    fake = varied(model, decoder=decoder)
    reply = fake.ask(None, "?", schema=SCENE)
    at_once = decoder.read[1:]
    assert max(at_once) >= len('"shape": "')
    assert sum(at_once) < reply.answer_tokens  # what it forces at the end is not read at all
    decoder.read.clear()
    one_by_one = fake.ask(None, "?", schema=SCENE, logprobs=True)
    assert one_by_one.token_ids == reply.token_ids
    assert decoder.read[1:] == [1] * (reply.answer_tokens - 1)


@pytest.mark.parametrize("schema", [None, SCENE, ["circle", "square"]], ids=["free", "json", "choices"])
def test_logprobs_are_the_models_own(model: EdgeModel, schema: Any) -> None:
    reply = model.ask(PICTURE, QUESTIONS[0], schema=schema, logprobs=True, max_new_tokens=40)
    ids = model.chat.ids(messages_of(QUESTIONS[0], 1))
    embeds = model.embedding.place(ids, standin.IMAGE_TOKEN_ID, [model.encode(PICTURE).features])
    expected = []
    for count, token_id in enumerate(reply.token_ids):
        answered = np.concatenate([embeds, model.embedding.rows(reply.token_ids[:count])])
        weights = np.exp(model.decoder.start(len(answered)).append(answered).astype(np.float64))
        expected.append(np.log(weights[token_id] / weights.sum()))
    np.testing.assert_allclose(reply.logprobs, expected, atol=1e-3)
    assert model.ask(PICTURE, QUESTIONS[0], schema=schema, max_new_tokens=40).logprobs is None


def test_logits_without_a_token_and_tokens_without_a_logit_are_never_chosen(model: EdgeModel) -> None:
    for vocab_size in (standin.VOCAB + 60, standin.VOCAB - 20):
        decoder = FakeDecoder(standin.HIDDEN, vocab_size)
        decoder.projection[:, 258:] *= 100  # the fillers, and what lies beyond the tokenizer, are what it likes best
        reply = varied(model, decoder=decoder).ask(None, "?", schema=re.compile("[^a]{8}"))
        assert len(reply.value) == 8
        assert max(reply.token_ids) <= standin.EOS


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objct"}, "objct"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"$ref": "https://example.org/schema.json"}, "example.org"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"enum": [{1, 2}]}, "not JSON"),
        (re.compile("(?=a)b"), "look-around"),
        (re.compile(b"a"), "bytes"),
        (Lark("start: missing"), "missing"),
        (Lark("no grammar"), "cannot be followed"),
        ("yes or no", "is not understood"),
        (3, "is not understood"),
        (int, "is not understood"),
    ],
    ids=str,
)
def test_what_is_no_schema_is_refused_in_one_line_before_anything_runs(
    model: EdgeModel, schema: Any, reason: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(reason)) as caught:
        model.stream(PICTURE, QUESTIONS[0], schema=schema)
    assert "\n" not in str(caught.value)


def test_a_stop_beside_a_schema_is_refused(model: EdgeModel) -> None:
    with pytest.raises(RequestError, match="leave stop out"):
        model.stream(PICTURE, QUESTIONS[0], schema=SCENE, stop=["}"])


def test_an_answer_that_is_cut_off_says_how_far_it_came(model: EdgeModel) -> None:
    stream = model.stream(PICTURE, QUESTIONS[0], schema=SCENE, max_new_tokens=12)
    pieces = []
    with pytest.raises(AnswerError, match=r"max_new_tokens 12 ended .*\"shape") as caught:
        pieces += stream
    assert "\n" not in str(caught.value)
    # A number may end at any digit; one that the tokens ended is no answer all the same.
    with pytest.raises(AnswerError, match="99"):
        model.ask(None, "?", schema=re.compile("9+"), max_new_tokens=4)
    with pytest.raises(AnswerError, match="the deadline, at 1 tokens"):
        model.ask(None, "?", schema=re.compile("[a-z]{9}"), deadline_sec=1e-9)


def test_what_the_models_tokens_cannot_spell_is_an_error(model: EdgeModel) -> None:
    compiler = GrammarCompiler(sentencepiece("legacy"), vocab_size=20, stop_ids=(0,))
    guide = compiler.compile(re.compile("YesQ")).start()
    with pytest.raises(AnswerError, match="cannot go on as its schema says") as caught:
        while not guide.done:
            guide.take(int(guide.mask(np.arange(20, dtype=np.float32)).argmax()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["YesNo", " Yes", "Yes Yes"])
@pytest.mark.parametrize("seed", range(3))
def test_spaces_in_tokens_are_read_as_they_stand(pattern: str, seed: int) -> None:
    """Llama's decoder drops the first space of a text; here it is the schema that says whether one is there."""
    guide = GrammarCompiler(sentencepiece("legacy"), vocab_size=20, stop_ids=(0,)).compile(re.compile(pattern)).start()
    rng, text = np.random.default_rng(seed), ""
    while not guide.done:
        token_id = int(guide.mask(rng.standard_normal(20).astype(np.float32)).argmax())
        guide.take(token_id)
        text += guide.push(token_id)
    assert text + guide.flush() == pattern


def test_a_pydantic_model_has_no_room_for_fields_that_it_would_drop() -> None:
    class Room(pydantic.BaseModel):
        scene: Scene

    class Open(Scene, extra="allow"):
        pass

    closed, parse = grammar_source(Room)
    assert closed["json_schema"]["additionalProperties"] is False
    assert closed["json_schema"]["$defs"]["Scene"]["additionalProperties"] is False
    assert parse('{"scene": {"shape": "a", "crowded": true}}') == Room(scene=Scene(shape="a", crowded=True))
    assert grammar_source(Open)[0]["json_schema"]["additionalProperties"] is True


def test_what_a_pydantic_model_refuses_beyond_its_schema_is_an_error(model: EdgeModel) -> None:
    with pytest.raises(AnswerError, match="it is never right") as caught:
        model.ask(None, "?", schema=Picky)
    assert "\n" not in str(caught.value)


def test_every_question_of_many_starts_the_schema_anew(model: EdgeModel) -> None:
    many = model.ask_many(PICTURE, QUESTIONS, schema=SCENE)
    separate = [model.ask(PICTURE, question, schema=SCENE) for question in QUESTIONS]
    assert [reply.token_ids for reply in many] == [reply.token_ids for reply in separate]


def test_threads_share_one_table_of_tokens(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = []

    def table(*arguments: Any, **options: Any) -> llguidance.LLTokenizer:
        tables.append(original(*arguments, **options))
        return tables[-1]

    original = llguidance.LLTokenizer
    schemas = [SCENE, Scene, re.compile("[a-z]{6}"), {"type": "array", "items": SCENE, "maxItems": 1}] * 6
    expected = [model.ask(None, "?", schema=schema).token_ids for schema in schemas]
    monkeypatch.setattr(llguidance, "LLTokenizer", table)
    fresh = EdgeModel(
        *(getattr(model, part) for part in ("manifest", "vision", "chat", "embedding", "decoder")), 256, 0
    )
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda schema: fresh.ask(None, "?", schema=schema).token_ids, schemas))
    assert found == expected
    assert len(tables) == 1


def test_without_llguidance_choices_alone_can_be_asked_for(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(DependencyError, match="pip install 'llguidance>="):
        model.stream(None, "?", schema=SCENE)
    assert model.ask(None, "?", schema=["yes", "no"]).value in ("yes", "no")


@pytest.mark.parametrize("schema", [SCENE, ["yes", "no", "not at all"]], ids=["json", "choices"])
def test_a_session_is_as_it_was_after_a_schema_and_keeps_the_raw_text(model: EdgeModel, schema: Any) -> None:
    session = model.session()
    session.look(PICTURE)
    before = session.ask(QUESTIONS[0], max_new_tokens=8)
    asked = session.ask(QUESTIONS[1], schema=schema)
    assert asked.token_ids == model.ask(PICTURE, QUESTIONS[1], schema=schema).token_ids
    assert session.ask(QUESTIONS[0], max_new_tokens=8).token_ids == before.token_ids
    with pytest.raises((AnswerError, RequestError)):
        session.ask(QUESTIONS[1], keep=True, schema=schema, max_new_tokens=2)
    kept = session.ask(QUESTIONS[1], keep=True, schema=schema)
    assert kept.token_ids == asked.token_ids
    after = session.ask(QUESTIONS[2], max_new_tokens=8)
    conversation = [user(QUESTIONS[1], 1), assistant(kept.text), user(QUESTIONS[2])]
    assert after.token_ids == model.ask(PICTURE, conversation, max_new_tokens=8).token_ids
    # Every token of the kept turn but the last was in the cache, as the template cuts this answer as the model did.
    assert after.cached_tokens >= kept.prompt_tokens + kept.image_tokens
