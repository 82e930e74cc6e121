"""A model with a memory answers as one without, whatever came before, and reads and sees less for it."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.device import standin
from tests.device.test_model import OTHER, PICTURE
from tests.device.test_session import SYSTEM, TEMPLATES, FailingDecoder, assistant, encodings, user, varied
from vz_edge.budget import TokenBudget
from vz_edge.device.cached_model import BYTES_IF_UNKNOWN, MOST_BYTES, CachedModel, default_bytes
from vz_edge.device.cuda_graph import GraphDecoder
from vz_edge.device.fake_decoder import FakeDecoder
from vz_edge.device.image import Tiles
from vz_edge.device.model import EdgeModel
from vz_edge.device.onnx_decoder import open_decoder_session
from vz_edge.device.reply import Reply
from vz_edge.device.runtime import CPU
from vz_edge.device.vision import VisionResult
from vz_edge.errors import AnswerError, BudgetError, ContextLengthError, ImageError, RequestError

COUNT = 6
PLENTY = 2**28
SMALLER = TokenBudget(2, 1)  # beside the stand-in's own


class TwoBudgets:
    """The stand-in's vision, which gives the smaller budget the first tokens of each tile."""

    def __init__(self, vision: Any) -> None:
        self.tile = vision.tile
        self._vision = vision

    def encode(self, tiles: Tiles, budget: TokenBudget | None = None) -> VisionResult:
        result: VisionResult = self._vision.encode(tiles)
        if budget != SMALLER:
            return result
        per_tile = result.features.reshape(len(tiles.pixel_values), -1, standin.HIDDEN)
        return replace(result, features=per_tile[:, : SMALLER.per_tile].reshape(-1, standin.HIDDEN))


@pytest.fixture(scope="module")
def two_budgets(model: EdgeModel) -> EdgeModel:
    return two_budgets_of(model)


def two_budgets_of(model: EdgeModel, decoder: Any = None, template: str = standin.TEMPLATE) -> EdgeModel:
    manifest = replace(model.manifest, more_budgets=(SMALLER,))
    chat = replace(model.chat, template=template)
    decoder = decoder or FakeDecoder(standin.HIDDEN, standin.VOCAB)
    return EdgeModel(manifest, TwoBudgets(model.vision), chat, model.embedding, decoder, 4000, load_sec=0.0)  # type: ignore[arg-type]


def assert_same(found: Reply, fresh: Reply) -> None:
    for name in ("text", "token_ids", "finish_reason", "prompt_tokens", "image_tokens", "value", "logprobs"):
        assert getattr(found, name) == getattr(fresh, name), name


def totals(model: EdgeModel) -> list[int]:
    return [budget.total(model.manifest.model.max_tiles) for budget in model.manifest.budgets]


def test_a_second_turn_reads_only_what_is_new(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = model.cached(PLENTY)
    messages = [user("What is this?", 1)]
    with encodings(model, monkeypatch) as seen:
        first = cached.ask(PICTURE, messages, max_new_tokens=COUNT)
        messages += [assistant(first.text), user("Why?")]
        second = cached.ask(PICTURE, messages, max_new_tokens=COUNT)
        again = cached.ask(PICTURE, messages, max_new_tokens=COUNT)
    assert len(seen) == 1
    assert_same(first, model.ask(PICTURE, "What is this?", max_new_tokens=COUNT))
    assert_same(second, model.ask(PICTURE, messages, max_new_tokens=COUNT))
    assert first.cached_tokens == 0
    assert second.cached_tokens >= first.prompt_tokens + first.image_tokens
    assert again.cached_tokens == again.prompt_tokens + again.image_tokens - 1
    assert_same(again, second)
    assert 0 < cached.size_bytes <= PLENTY


def test_a_picture_is_known_by_its_pixels(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = model.cached(PLENTY)
    with encodings(model, monkeypatch) as seen:
        cached.ask(PICTURE, "What?", max_new_tokens=1)
        reply = cached.ask(Image.fromarray(PICTURE), "Why?", max_new_tokens=1)
        assert len(seen) == 1
        assert reply.cached_tokens >= reply.image_tokens
        changed = PICTURE.copy()
        changed[0, 0, 0] ^= 1
        cached.ask(changed, "Why?", max_new_tokens=1)
        cached.ask(PICTURE.reshape(PICTURE.shape[1], PICTURE.shape[0], 3), "Why?", max_new_tokens=1)
        assert len(seen) == 3
        cached.ask([OTHER, OTHER], "Same?", max_new_tokens=1)
        assert len(seen) == 4


def test_a_look_is_what_questions_find(two_budgets: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = two_budgets.cached(PLENTY)
    full, small = totals(two_budgets)
    with encodings(two_budgets, monkeypatch) as seen:
        looks = [cached.look(PICTURE), cached.look(PICTURE, full), cached.look(PICTURE, small)]
        assert len(seen) == 2
        for tokens, look in ((None, looks[0]), (full, looks[0]), (small, looks[2])):
            reply = cached.ask(PICTURE, "What?", tokens=tokens, max_new_tokens=COUNT)
            assert reply.image_tokens == look.image_tokens
            assert_same(reply, two_budgets.ask(look.picture, "What?", max_new_tokens=COUNT))
        assert len(seen) == 2
    assert looks[0].picture is looks[1].picture is not looks[2].picture


def test_pictures_in_kept_prompts_are_not_encoded_again(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the pictures' own part of the memory is too small for them."""
    cached = model.cached(8 * model.encode(PICTURE).size_bytes - 8)
    cached._prompts._max_bytes = PLENTY
    with encodings(model, monkeypatch) as seen:
        cached.ask(PICTURE, "What?", max_new_tokens=1)
        assert cached._pictures.size_bytes == 0
        assert cached.ask(PICTURE, "What?", max_new_tokens=1).cached_tokens > 0
    assert len(seen) == 1


def test_a_kept_picture_holds_no_memory_of_the_runtime(model: EdgeModel) -> None:
    picture = model.cached(PLENTY).look(PICTURE).picture
    assert picture.features.flags.owndata and picture.kept is not None and picture.kept.flags.owndata


def test_the_least_recently_seen_picture_makes_room(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [np.full((60, 90, 3), value, np.uint8) for value in range(3)]
    cached = model.cached(8 * 2 * model.encode(PICTURE).size_bytes)
    with encodings(model, monkeypatch) as seen:
        for number in (0, 1, 0, 2, 0, 1):
            cached.look(pictures[number])
    assert len(seen) == 4


def test_without_memory_it_is_the_model_itself(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = model.cached(0)
    with encodings(model, monkeypatch) as seen:
        for _ in range(2):
            assert cached.ask(PICTURE, "What?", max_new_tokens=1).cached_tokens == 0
    assert (len(seen), cached.size_bytes) == (2, 0)
    for impossible in (-1, "1", 1.5):
        with pytest.raises(RequestError, match="max_bytes"):
            model.cached(impossible)  # type: ignore[arg-type]


def test_what_is_cleared_is_forgotten(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = model.cached(PLENTY)
    with encodings(model, monkeypatch) as seen:
        for _ in range(2):
            assert cached.ask(PICTURE, "What?", max_new_tokens=1).cached_tokens == 0
            assert cached.size_bytes > 0
            cached.clear()
            assert cached.size_bytes == 0
    assert len(seen) == 2


def test_an_answer_goes_on_to_its_end_where_the_model_is_closed_meanwhile(bundle: Any) -> None:
    model = EdgeModel.load(bundle, threads=1)
    expected = model.ask(PICTURE, "What?", max_new_tokens=COUNT)
    cached = model.cached(PLENTY)
    stream = cached.stream(PICTURE, "What?", max_new_tokens=COUNT)
    first = next(stream)
    model.close()
    assert first + "".join(stream) == expected.text
    assert_same(stream.reply, expected)
    for ask in (lambda: cached.ask(PICTURE, "What?"), lambda: cached.look(PICTURE)):
        with pytest.raises(RequestError, match="closed"):
            ask()
    cached.clear()
    assert cached.size_bytes == 0


def test_what_is_kept_by_default_depends_on_the_memory_there_is(model: EdgeModel) -> None:
    assert default_bytes(None) == BYTES_IF_UNKNOWN
    assert default_bytes(2**30) == 2**28
    assert default_bytes(2**40) == MOST_BYTES
    assert isinstance(model.cached(), CachedModel)


def test_errors_are_those_of_the_model(model: EdgeModel) -> None:
    cached = model.cached(PLENTY)
    cached.look(PICTURE)
    for call, error in [
        (lambda asked: asked.ask(PICTURE, "What?", tokens=3), BudgetError),
        (lambda asked: asked.ask(PICTURE[..., :2], "What?"), ImageError),
        (lambda asked: asked.ask(PICTURE, [user("What?", 2)]), RequestError),
        (lambda asked: asked.ask(PICTURE, "What?", max_new_tokens=5000), ContextLengthError),
        (
            lambda asked: asked.ask(model.encode(PICTURE), "What?", tokens=totals(model)[0]),
            RequestError,
        ),
    ]:
        messages = []
        for asked in (model, cached):
            with pytest.raises(error) as raised:
                call(asked)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("late", [False, True])
def test_what_a_failing_device_read_is_forgotten(model: EdgeModel, late: bool) -> None:
    decoder = FailingDecoder(standin.HIDDEN, standin.VOCAB)
    decoder.late = late
    fake = varied(model, decoder=decoder)
    cached = fake.cached(PLENTY)
    fresh = fake.ask(PICTURE, "What?", max_new_tokens=COUNT)
    for calls in (0, 2):
        decoder.calls_left = calls
        with pytest.raises(RuntimeError):
            cached.ask(PICTURE, "What?", max_new_tokens=COUNT)
        reply = cached.ask(PICTURE, "What?", max_new_tokens=COUNT)
        assert reply.cached_tokens == 0
        assert_same(reply, fresh)


def test_what_was_read_until_a_schema_was_broken_is_kept(model: EdgeModel) -> None:
    pytest.importorskip("llguidance")
    cached = model.cached(PLENTY)
    schema = {"type": "string", "minLength": 30}
    with pytest.raises(AnswerError):
        cached.ask(PICTURE, "What?", schema=schema, max_new_tokens=5)
    reply = cached.ask(PICTURE, "What?", max_new_tokens=COUNT)
    assert reply.cached_tokens == reply.prompt_tokens + reply.image_tokens - 1
    assert_same(reply, model.ask(PICTURE, "What?", max_new_tokens=COUNT))


def test_a_stream_that_is_thrown_away_gives_back_what_it_took(model: EdgeModel) -> None:
    cached = model.cached(PLENTY)
    stream: Any = cached.stream(PICTURE, "What?", max_new_tokens=COUNT)
    next(stream)
    cycle = [stream]
    cycle.append(cycle)
    del stream, cycle
    gc.collect()
    assert cached.ask(PICTURE, "What?", max_new_tokens=COUNT).cached_tokens > 0


def test_threads_do_not_mix_answers(model: EdgeModel) -> None:
    """Each asks about pictures of its own and about one of all."""
    fake = varied(model)
    cached = fake.cached(40 * 256 * standin.HIDDEN * 4)
    wrong: list[Any] = []

    def conversation(number: int) -> None:
        rng = np.random.default_rng(number)
        own = rng.integers(0, 256, (40, 40, 3), np.uint8)
        for picture in (own, PICTURE, own):
            messages: list[dict] = []
            for turn in range(3):
                messages.append(user(f"{number} asks {turn}", not turn))
                found = cached.ask(picture, messages, max_new_tokens=COUNT)
                fresh = fake.ask(picture, messages, max_new_tokens=COUNT)
                if found.token_ids != fresh.token_ids:
                    wrong.append((number, messages))
                messages.append(assistant(found.text))

    threads = [threading.Thread(target=conversation, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture(scope="module")
def decoders(bundle: Any) -> dict[str, Any]:
    session = open_decoder_session(bundle, [CPU], threads=1)
    return {"fake": FakeDecoder(standin.HIDDEN, standin.VOCAB), "graph": GraphDecoder(session, standin.CONTEXT)}


ASKED = st.fixed_dictionaries(
    {
        "conversation": st.integers(0, 3),
        "fork": st.booleans(),
        "end": st.sampled_from(["whole", "whole", "leave", "deadline", "schema", "cut off"]),
        "text": st.sampled_from(["What is this?", "What is that?", "Why? " * 30, "Is the door on the left open?"]),
        "picture": st.integers(0, 2),
        "small": st.booleans(),
        "system": st.sampled_from([None, SYSTEM, SYSTEM * 5]),
    }
)


def test_the_one_context_with_the_graph_is_kept_and_has_it_again(model: EdgeModel, decoders: dict[str, Any]) -> None:
    """Its memory is the decoder's: all that it takes of the room is its pictures'."""
    graph = two_budgets_of(model, decoders["graph"])
    graph.context_length = standin.CONTEXT
    picture_bytes = graph.encode(PICTURE).size_bytes
    assert 2 * picture_bytes < standin.CONTEXT * graph.decoder.cache_bytes_per_token
    for max_bytes in (2 * picture_bytes, 0):
        cached = graph.cached(max_bytes)
        for picture, known in ((PICTURE, False), (PICTURE, True), (OTHER, False), (PICTURE, False)):
            reply = cached.ask(picture, "What is this?", max_new_tokens=COUNT)
            assert (reply.cached_tokens > 0) == (known and max_bytes > 0)
            assert len(decoders["graph"]._decoding) == (max_bytes > 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(ASKED, max_size=8), st.sampled_from([0, 3, 20]), st.sampled_from(sorted(TEMPLATES)))
def test_any_course_of_conversations_is_answered_as_by_a_fresh_model(
    model: EdgeModel, asked: list[dict], blocks: int, template: str
) -> None:
    """Conversations take turns, fork and end in the midst, with pictures, budgets and system prompts of their own."""
    pytest.importorskip("llguidance")
    fake = two_budgets_of(model, template=TEMPLATES[template])
    interleave(fake, asked, blocks * 256 * fake.decoder.cache_bytes_per_token * 8 // 7)


@settings(max_examples=15, deadline=None)
@given(st.lists(ASKED, max_size=6))
def test_any_course_of_conversations_with_one_graph(
    model: EdgeModel, decoders: dict[str, Any], asked: list[dict]
) -> None:
    pytest.importorskip("llguidance")
    graph = two_budgets_of(model, decoders["graph"])
    graph.context_length = standin.CONTEXT
    short = [{**step, "text": step["text"][:20], "system": step["system"] and SYSTEM} for step in asked]
    interleave(graph, short, PLENTY)


def interleave(fake: EdgeModel, asked: list[dict], max_bytes: int) -> None:
    cached = fake.cached(max_bytes)
    pictures = [PICTURE, OTHER, PICTURE[:, ::-1].copy()]
    conversations: list[tuple[list, list[dict]]] = [([], []) for _ in range(4)]
    for step in asked:
        shown, messages = conversations[step["conversation"]]
        if step["fork"]:
            conversations[(step["conversation"] + 1) % 4] = (list(shown), list(messages))
        if not messages and step["system"]:
            messages.append({"role": "system", "content": step["system"]})
        with_picture = len(shown) < 2 and step["picture"] < 2
        question = [*messages, user(step["text"], with_picture)]
        pictured = [*shown, pictures[step["picture"]]] if with_picture else shown
        options: dict[str, Any] = {"max_new_tokens": 4, "tokens": totals(fake)[step["small"]]}
        if step["end"] == "deadline":
            options["deadline_sec"] = 1e-6
        elif step["end"] in ("schema", "cut off"):
            options["schema"] = {"enum": [True]} if step["end"] == "schema" else {"type": "string", "minLength": 9}
        try:
            fresh = fake.ask(pictured, question, **options)
        except (AnswerError, ContextLengthError) as error:
            with pytest.raises(type(error)):
                cached.ask(pictured, question, **options)
            continue
        if step["end"] == "leave":
            stream = cached.stream(pictured, question, **options)
            next(stream, None)
            stream.close()
        reply = cached.ask(pictured, question, **options)
        assert_same(reply, fresh)
        assert reply.cached_tokens < reply.prompt_tokens + reply.image_tokens
        if step["end"] == "leave" and max_bytes == PLENTY:
            assert reply.cached_tokens == reply.prompt_tokens + reply.image_tokens - 1
        assert cached.size_bytes <= max_bytes
        shown[:], messages[:] = pictured, [*question, assistant(reply.text)]
