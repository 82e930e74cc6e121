"""A session answers as EdgeModel.ask does with the whole conversation, token for token, and reads less for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.device import standin
from tests.device.test_model import OTHER, PICTURE, QUESTIONS
from vz_edge.device.fake_decoder import FakeContext, FakeDecoder
from vz_edge.device.model import EdgeModel
from vz_edge.device.session import Session
from vz_edge.errors import ContextLengthError, ImageError, RequestError, VzEdgeError

COUNT = 8
SYSTEM = "Be brief."
IMAGE = {"type": "image"}
TEMPLATES = {
    "growing": standin.TEMPLATE,
    # Says first how long the conversation is: a new turn changes what was read before it.
    "rewriting": "{{ messages | length }} " + standin.TEMPLATE,
    # Forgets what the assistant said before its last turn, as templates of reasoning models do.
    "forgetful": standin.TEMPLATE.replace(
        "{% for part",
        "{% if message['role'] == 'assistant' and not loop.last %}...{% continue %}{% endif %}{% for part",
    ),
    "pictures-last": standin.TEMPLATE.replace("<image>\n", "").replace(
        "{% endfor %} {% endfor %}",
        "{% endfor %}{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %} {% endfor %}",
    ),
}


class FailingDecoder(FakeDecoder):
    """Breaks off at the call that ``calls_left`` says: before the tokens are in the cache or, if ``late``, after."""

    calls_left: int | None = None
    late = False

    def start(self, capacity: int) -> FakeContext:
        return FailingContext(self, capacity)


class FailingContext(FakeContext):
    def append(self, embeds: np.ndarray) -> np.ndarray:
        decoder: Any = self._decoder
        if decoder.calls_left == 0:
            decoder.calls_left = None
            if decoder.late:
                super().append(embeds)
            raise RuntimeError("the device was lost")
        if decoder.calls_left is not None:
            decoder.calls_left -= 1
        return super().append(embeds)


def varied(model: EdgeModel, **parts: Any) -> EdgeModel:
    """The stand-in with other parts: ``template``, ``tokenizer``, ``decoder``."""
    decoder = parts.pop("decoder", None) or FakeDecoder(standin.HIDDEN, standin.VOCAB)
    chat = replace(model.chat, **parts)
    return EdgeModel(model.manifest, model.vision, chat, model.embedding, decoder, 4000, load_sec=0.0)


@pytest.fixture(params=TEMPLATES)
def fake(model: EdgeModel, request: pytest.FixtureRequest) -> EdgeModel:
    return varied(model, template=TEMPLATES[request.param])


@contextmanager
def encodings(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """What goes through the vision graph."""
    seen: list = []
    encode = model.vision.encode
    with monkeypatch.context() as patch:
        patch.setattr(model.vision, "encode", lambda tiles, *budget: seen.append(tiles) or encode(tiles, *budget))
        yield seen


def user(text: str, pictures: int = 0) -> dict:
    return {"role": "user", "content": [*[IMAGE] * pictures, {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_questions_cost_one_picture_and_are_answered_as_fresh_ones(
    model: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = [model.ask(PICTURE, question, max_new_tokens=COUNT) for question in QUESTIONS]
    session = model.session()
    with encodings(model, monkeypatch) as seen:
        look = session.look(PICTURE)
        replies = [session.ask(question, max_new_tokens=COUNT) for question in QUESTIONS * 2]
    assert len(seen) == 1
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in fresh * 2]
    assert [reply.text for reply in replies] == [reply.text for reply in fresh * 2]
    assert look.image_tokens == len(model.encode(PICTURE).features)
    assert min(look.preprocess_sec, look.vision_sec, look.prefill_sec) > 0
    for reply, question in zip(replies, QUESTIONS * 2, strict=True):
        read = reply.prompt_tokens + reply.image_tokens - reply.cached_tokens
        assert read == len(f"{question} ASSISTANT:")
        assert reply.prompt_tokens == len(f"USER: \n{question} ASSISTANT:") + 1
        assert reply.vision_sec == reply.preprocess_sec == 0
        assert reply.prefill_tokens_per_sec == read / reply.prefill_sec
    assert all(reply.cached_tokens == 0 for reply in fresh)


def test_kept_turns_are_a_conversation(fake: EdgeModel) -> None:
    session = fake.session()
    session.look(PICTURE)
    messages: list[dict] = []
    for turn, question in enumerate(QUESTIONS):
        messages.append(user(question, pictures=turn == 0))
        aside = session.ask("Why?", max_new_tokens=COUNT)
        expected_aside = fake.ask(PICTURE, [*messages[:-1], user("Why?", pictures=turn == 0)], max_new_tokens=COUNT)
        assert aside.token_ids == expected_aside.token_ids
        reply = session.ask(question, keep=True, max_new_tokens=COUNT)
        assert reply.token_ids == fake.ask(PICTURE, messages, max_new_tokens=COUNT).token_ids
        messages.append(assistant(reply.text))


def test_a_kept_answer_is_not_read_again(model: EdgeModel) -> None:
    """The real decoder; the answer is plain text that is cut into the tokens it was written in."""
    session = model.session()
    session.look(PICTURE)
    ascii_ids = frozenset(range(256)) - {model.chat.tokenizer.encode(c).ids[1] for c in map(chr, range(33, 127))}
    first = session.ask(QUESTIONS[0], keep=True, max_new_tokens=COUNT, stop=sorted(ascii_ids))
    second = session.ask(QUESTIONS[1], max_new_tokens=COUNT)
    messages = [user(QUESTIONS[0], 1), assistant(first.text), user(QUESTIONS[1])]
    assert second.token_ids == model.ask(PICTURE, messages, max_new_tokens=COUNT).token_ids
    # The template puts a space between "ASSISTANT:" and the answer, where the answer itself began.
    assert second.cached_tokens == first.prompt_tokens + first.image_tokens
    third = session.ask(QUESTIONS[1], max_new_tokens=COUNT)
    assert third.token_ids == second.token_ids
    assert third.cached_tokens == third.prompt_tokens + third.image_tokens - len(f"{QUESTIONS[1]} ASSISTANT:")


def test_another_picture_replaces_the_last_or_joins_it(fake: EdgeModel) -> None:
    session = fake.session()
    session.look(PICTURE)
    session.ask(QUESTIONS[0], keep=True, max_new_tokens=COUNT)
    session.look(OTHER)
    reply = session.ask("Why?", max_new_tokens=COUNT)
    assert reply.token_ids == fake.ask(OTHER, "Why?", max_new_tokens=COUNT).token_ids
    session.look(PICTURE, add=True)
    both = session.ask("Compare.", keep=True, max_new_tokens=COUNT)
    assert both.token_ids == fake.ask([OTHER, PICTURE], "Compare.", max_new_tokens=COUNT).token_ids
    assert both.image_tokens == sum(len(fake.encode(picture).features) for picture in (OTHER, PICTURE))
    session.look(OTHER, add=True)
    later = [user("Compare.", 2), assistant(both.text), user("And now?", 1)]
    reply = session.ask("And now?", max_new_tokens=COUNT)
    assert reply.token_ids == fake.ask([OTHER, PICTURE, OTHER], later, max_new_tokens=COUNT).token_ids
    session.look(PICTURE)
    reply = session.ask("And now?", max_new_tokens=COUNT)
    assert reply.token_ids == fake.ask([OTHER, PICTURE, PICTURE], later, max_new_tokens=COUNT).token_ids


def test_without_a_picture_it_is_a_chat_and_a_later_picture_is_its_first(fake: EdgeModel) -> None:
    session = fake.session()
    hello = session.ask("Hello.", keep=True, max_new_tokens=COUNT)
    assert hello.token_ids == fake.ask(None, "Hello.", max_new_tokens=COUNT).token_ids
    for picture in (PICTURE, OTHER):
        session.look(picture)
        messages = [user("Hello."), assistant(hello.text), user("Why?", 1)]
        expected = fake.ask(picture, messages, max_new_tokens=COUNT)
        assert session.ask("Why?", max_new_tokens=COUNT).token_ids == expected.token_ids


def test_the_system_prompt_stays_in_the_cache_across_frames(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    session = model.session(system=SYSTEM)
    appended: list[int] = []
    context = session._prefix.context
    append = context.append
    monkeypatch.setattr(context, "append", lambda embeds: appended.append(len(embeds)) or append(embeds))
    for picture in (PICTURE, OTHER, PICTURE):
        session.look(picture)
        reply = session.ask("Why?", max_new_tokens=1)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Why?"}]
        assert reply.token_ids == model.ask(picture, messages, max_new_tokens=1).token_ids
        assert appended == [reply.image_tokens + len("\n"), len("Why? ASSISTANT:")]
        appended.clear()


def test_a_picture_that_was_looked_at_before_costs_nothing_again(
    model: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.session()
    picture = session.look(PICTURE).picture
    monkeypatch.setattr(session._prefix.context, "append", lambda embeds: pytest.fail("it was read again"))
    with encodings(model, monkeypatch) as seen:
        assert session.look(picture).picture is picture
    assert not seen


def test_it_begins_anew_from_what_the_cache_has(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    session = model.session()
    pictures = session.restart([PICTURE, OTHER])
    fresh = session.ask("Why?", max_new_tokens=COUNT)
    assert fresh.token_ids == model.ask([PICTURE, OTHER], "Why?", max_new_tokens=COUNT).token_ids
    session.ask("What is this?", keep=True, max_new_tokens=COUNT)
    with monkeypatch.context() as patch, encodings(model, monkeypatch) as seen:
        patch.setattr(session._prefix.context, "append", lambda embeds: pytest.fail("it was read again"))
        assert session.restart(pictures) == pictures and not seen  # the turn alone is forgotten
    again = session.ask("Why?", max_new_tokens=COUNT)
    assert again.token_ids == fresh.token_ids and again.cached_tokens == fresh.cached_tokens > again.image_tokens
    session.restart(pictures[1:], system=SYSTEM)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Why?"}]
    assert (
        session.ask("Why?", max_new_tokens=COUNT).token_ids
        == model.ask(OTHER, messages, max_new_tokens=COUNT).token_ids
    )
    session.restart()
    assert (
        session.ask("Why?", max_new_tokens=COUNT).token_ids == model.ask(None, "Why?", max_new_tokens=COUNT).token_ids
    )


def test_what_it_cannot_begin_with_leaves_it_as_it_was(model: EdgeModel) -> None:
    silent = varied(
        model, template=standin.TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")
    )
    session = silent.session(max_context=200)
    session.look(PICTURE)
    session.ask("What?", keep=True, max_new_tokens=COUNT)
    before = [session.ask("Why?", max_new_tokens=COUNT) for _ in range(2)][-1]
    for images, options, error in (
        ([OTHER], {"system": SYSTEM}, RequestError),
        (["absent.png"], {}, ImageError),
        ([PICTURE] * 20, {}, ContextLengthError),
        ([PICTURE], {"tokens": 7}, VzEdgeError),
    ):
        with pytest.raises(error):
            session.restart(images, **options)  # type: ignore[arg-type]
        after = session.ask("Why?", max_new_tokens=COUNT)
        assert (after.token_ids, after.cached_tokens) == (before.token_ids, before.cached_tokens)


def test_forks_go_their_own_ways(model: EdgeModel) -> None:
    session = model.session(system=SYSTEM)
    session.look(PICTURE)
    first = session.ask(QUESTIONS[0], keep=True, max_new_tokens=COUNT)
    fork = session.fork()
    past = [{"role": "system", "content": SYSTEM}, user(QUESTIONS[0], 1), assistant(first.text)]
    kept = {}
    for branch, question in ((session, QUESTIONS[1]), (fork, QUESTIONS[2])):
        kept[question] = branch.ask(question, keep=True, max_new_tokens=COUNT)
        expected = model.ask(PICTURE, [*past, user(question)], max_new_tokens=COUNT)
        assert kept[question].token_ids == expected.token_ids
        assert kept[question].cached_tokens >= first.prompt_tokens + first.image_tokens
    fork.look(OTHER)
    reply = session.ask("Why?", max_new_tokens=COUNT)
    turns = [*past, user(QUESTIONS[1]), assistant(kept[QUESTIONS[1]].text), user("Why?")]
    assert reply.token_ids == model.ask(PICTURE, turns, max_new_tokens=COUNT).token_ids
    reply = fork.ask("Why?", max_new_tokens=COUNT)
    assert reply.token_ids == model.ask(OTHER, [past[0], user("Why?", 1)], max_new_tokens=COUNT).token_ids


def test_a_stream_may_be_left(model: EdgeModel) -> None:
    session = model.session()
    session.look(PICTURE)
    whole = session.ask(QUESTIONS[0], max_new_tokens=COUNT)
    stream = session.stream(QUESTIONS[0], max_new_tokens=COUNT)
    assert "".join(stream) == stream.reply.text == whole.text
    for unread in (0, 2):
        left = session.stream(QUESTIONS[1], keep=True, max_new_tokens=COUNT)
        for _ in range(unread):
            next(left)
        reply = session.ask(QUESTIONS[0], max_new_tokens=COUNT)
        assert (reply.token_ids, reply.cached_tokens) == (whole.token_ids, stream.reply.cached_tokens)
        assert list(left) == []
        with pytest.raises(VzEdgeError, match="ask again"):
            left.reply  # noqa: B018
    left = session.stream(QUESTIONS[1], keep=True, max_new_tokens=COUNT)
    next(left)
    assert session.fork().ask(QUESTIONS[0], max_new_tokens=COUNT).token_ids == whole.token_ids


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_error_in_the_middle_leaves_the_session_as_it_was(model: EdgeModel, calls: int, late: bool) -> None:
    decoder = FailingDecoder(standin.HIDDEN, standin.VOCAB)
    decoder.late = late
    failing = varied(model, decoder=decoder)
    session = failing.session(system=SYSTEM)
    session.look(PICTURE)
    first = session.ask(QUESTIONS[0], keep=True, max_new_tokens=COUNT)
    decoder.calls_left = calls
    with pytest.raises(RuntimeError, match="lost"):
        session.ask(QUESTIONS[2], keep=True, max_new_tokens=COUNT)
    past = [{"role": "system", "content": SYSTEM}, user(QUESTIONS[0], 1), assistant(first.text)]
    expected = failing.ask(PICTURE, [*past, user(QUESTIONS[1])], max_new_tokens=COUNT)
    first_try, second_try = (session.ask(QUESTIONS[1], max_new_tokens=COUNT) for _ in range(2))
    assert first_try.token_ids == second_try.token_ids == expected.token_ids
    decoder.calls_left = 0
    with pytest.raises(RuntimeError, match="lost"):
        session.look(OTHER)
    # The new picture took the old one's place in the cache; the old one is read once more, and then it is there.
    again, repeated = (session.ask(QUESTIONS[1], max_new_tokens=COUNT) for _ in range(2))
    assert again.token_ids == repeated.token_ids == expected.token_ids
    assert again.cached_tokens < first_try.cached_tokens <= second_try.cached_tokens == repeated.cached_tokens


def test_what_does_not_fit_is_refused_before_anything_is_read(
    model: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.session(max_context=56)
    assert session.context_length == 56
    session.look(PICTURE)
    whole = session.ask("Why?", max_new_tokens=1)
    left = 56 - whole.prompt_tokens - whole.image_tokens
    assert session.ask("Why?", max_new_tokens=left).answer_tokens == left
    with monkeypatch.context() as patch, encodings(model, monkeypatch) as seen:
        patch.setattr(session._prefix.context, "append", lambda embeds: pytest.fail("it was read"))
        with pytest.raises(ContextLengthError, match=f"lower max_new_tokens to {left}$"):
            session.stream("Why?", max_new_tokens=left + 1)
        with pytest.raises(
            ContextLengthError, match=f"shorten the prompt by {1 + 24 * len('Why? ') + 1 - left} tokens"
        ):
            session.ask("Why? " * 25)
        with pytest.raises(ContextLengthError, match=f"{whole.image_tokens + 16} image tokens"):
            session.look(OTHER, add=True)
    assert not seen
    assert session.ask("Why?", max_new_tokens=1).token_ids == whole.token_ids
    with pytest.raises(ContextLengthError):
        model.session(system=SYSTEM * 40)
    assert model.session(max_context=10**6).context_length == model.context_length


def test_what_is_no_picture_question_or_setting_is_refused(model: EdgeModel) -> None:
    session = model.session()
    session.look(PICTURE)
    whole = session.ask("Why?", max_new_tokens=COUNT)
    for wrong in ("absent.jpg", np.zeros((4, 4), np.uint8)):
        with pytest.raises(ImageError):
            session.look(wrong)
    for question, options in ((["Why?"], {}), ("Why?", {"max_new_tokens": 0})):
        with pytest.raises(RequestError):
            session.ask(question, **options)  # type: ignore[arg-type]
    assert session.ask("Why?", max_new_tokens=COUNT).token_ids == whole.token_ids
    with pytest.raises(RequestError, match="max_context"):
        model.session(max_context=0)
    assert model.session(system="<image>").ask("Why?", max_new_tokens=1).image_tokens == 0


def test_a_template_without_a_place_for_a_system_prompt_is_found_out(model: EdgeModel) -> None:
    silent = standin.TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(RequestError, match="leaves a system prompt out"):
        varied(model, template=silent).session(system=SYSTEM)
    with pytest.raises(RequestError, match="no system role"):
        varied(model, template=refusing + standin.TEMPLATE).session(system=SYSTEM)
    assert varied(model, template=silent).session(system="").ask("Why?", max_new_tokens=1).answer_tokens == 1


@pytest.mark.parametrize("letter", ["I", "0", "W"])
def test_a_token_across_the_border_of_picture_and_question(model: EdgeModel, letter: str) -> None:
    """The newline after the picture and the question's first letter are one token, the common strings are not."""
    merging = varied(model, tokenizer=merging_tokenizer("Ċ" + letter))
    question = f"{letter}s it?"
    assert len(merging.chat.ids([user(question, 1)])) < len(model.chat.ids([user(question, 1)]))
    session = merging.session()
    session.look(PICTURE)
    for asked in (question, "Why?", question, "How many?"):
        reply = session.ask(asked, max_new_tokens=COUNT)
        assert reply.token_ids == merging.ask(PICTURE, asked, max_new_tokens=COUNT).token_ids
        assert reply.cached_tokens >= len("sUSER: ") + reply.image_tokens


def merging_tokenizer(pair: str) -> Tokenizer:
    """The stand-in's, with one merge; its id is that of a filler."""
    data = json.loads(standin.byte_tokenizer().to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] != 258]
    data["pre_tokenizer"]["use_regex"] = False  # the regular expression would never put the two into one word
    data["model"]["vocab"][pair] = 258
    data["model"]["merges"] = [list(pair)]
    return Tokenizer.from_str(json.dumps(data))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("look"), st.integers(0, 1), st.booleans()),
        st.tuples(st.just("ask"), st.sampled_from([*QUESTIONS, "I", "0?"]), st.booleans()),
        st.tuples(st.just("leave"), st.sampled_from(QUESTIONS), st.booleans()),
        st.tuples(st.just("fork"), st.none(), st.none()),
    ),
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.booleans(), STEPS)
def test_any_course_of_a_session_answers_as_fresh_asks(
    model: EdgeModel, template: str, system: bool, steps: list[tuple]
) -> None:
    fake = varied(model, template=TEMPLATES[template], tokenizer=merging_tokenizer("ĊI"))
    pictures = [fake.encode(picture) for picture in (PICTURE, OTHER)]
    session = fake.session(system=SYSTEM if system else None)
    course = Course([{"role": "system", "content": SYSTEM}] if system else [], [], 0)
    before_looks: list[Course] = []
    for kind, what, flag in steps:
        if kind == "look":
            session.look(pictures[what], add=flag)
            if not flag and before_looks:
                course = before_looks.pop()
            before_looks.append(course)
            course = Course(course.messages, [*course.pictures, pictures[what]], course.waiting + 1)
        elif kind == "ask":
            reply = session.ask(what, keep=flag, max_new_tokens=3)
            messages = [*course.messages, user(what, course.waiting)]
            assert reply.token_ids == fake.ask(course.pictures, messages, max_new_tokens=3).token_ids
            if flag:
                course = Course([*messages, assistant(reply.text)], course.pictures, 0)
        elif kind == "leave":
            stream = session.stream(what, keep=flag, max_new_tokens=3)
            if next(stream, None) is None and flag:  # all of the answer was special tokens: it is at its end
                course = Course([*course.messages, user(what, course.waiting), assistant("")], course.pictures, 0)
        else:
            abandoned, session = session, session.fork()
            abandoned.look(pictures[0])


class Course:
    """A conversation as a caller of EdgeModel.ask would keep it; ``waiting`` pictures have no question yet."""

    def __init__(self, messages: list[dict], pictures: list, waiting: int) -> None:
        self.messages, self.pictures, self.waiting = messages, pictures, waiting


def test_a_session_keeps_the_model_as_it_was(model: EdgeModel) -> None:
    before = model.context_length
    assert isinstance(model.session(max_context=50), Session)
    assert model.context_length == before
