"""One frame's answers: those of a fresh ask, within the deadline, and no work that a still picture does not need."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.device import standin
from tests.watch.camera import picture
from vz_edge.budget import TokenBudget
from vz_edge.device.fake_decoder import FakeContext, FakeDecoder
from vz_edge.device.image import ImageSource, Tiles
from vz_edge.device.model import EdgeModel
from vz_edge.device.vision import VisionResult
from vz_edge.errors import AnswerError, ContextLengthError, ImageError, RequestError
from vz_edge.watch.engine import Cancelled, Engine
from vz_edge.watch.frame import Frame
from vz_edge.watch.reader import Reading, Taken
from vz_edge.watch.result import Result

COUNT = 6
QUESTIONS = [("What is this?", {"max_new_tokens": COUNT}), ("Who is there?", {"max_new_tokens": COUNT})]
VISION_SEC, STEP_SEC = 10.0, 1.0


class Costs:
    """A clock that looking and each reading of the decoder move on; ``before`` is called first, ``log`` says what."""

    def __init__(self) -> None:
        self.sec = 0.0
        self.log: list[str] = []
        self.before: Any = lambda: None

    def __call__(self) -> float:
        return self.sec

    def spend(self, what: str, sec: float) -> None:
        self.before()
        self.log.append(what)
        self.sec += sec


class CostlyVision:
    def __init__(self, model: EdgeModel, costs: Costs) -> None:
        self.model, self.costs = model, costs

    def tile(self, source: ImageSource) -> Tiles:
        return self.model.vision.tile(source)

    def encode(self, tiles: Tiles, budget: TokenBudget | None = None) -> VisionResult:
        self.costs.spend("look", VISION_SEC)
        return self.model.vision.encode(tiles, budget)


class CostlyDecoder(FakeDecoder):
    costs: Costs

    def start(self, capacity: int) -> FakeContext:
        return CostlyContext(self, capacity)


class CostlyContext(FakeContext):
    def append(self, embeds: np.ndarray) -> np.ndarray:
        self._decoder.costs.spend("step" if len(embeds) == 1 else "read", STEP_SEC)  # type: ignore[attr-defined]
        return super().append(embeds)


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Costs:
    clock = Costs()
    monkeypatch.setattr(time, "perf_counter", clock)  # the clock of a question's own deadline
    return clock


def engine(model: EdgeModel, costs: Costs, **options: Any) -> Engine:
    decoder = CostlyDecoder(standin.HIDDEN, standin.VOCAB)
    decoder.costs = costs
    costly = EdgeModel(
        model.manifest, CostlyVision(model, costs), model.chat, model.embedding, decoder, 4000, load_sec=0.0
    )
    settings = {
        "questions": QUESTIONS,
        "tokens": None,
        "deadline": None,
        "unchanged_below": None,
        "cancelled": lambda: False,
    }
    session = costly.session(max_context=options.pop("max_context", None))
    made = Engine(costly, session, clock=costs, **(settings | options))
    costs.log.clear()
    return made


def answer(made: Engine, costs: Costs, pixels: Any, **frame: Any) -> Result:
    return made.answer(Taken(Reading(Frame(pixels, **frame), 0, 0.0, costs()), 0, costs()))


def tokens(result: Result) -> list[tuple[int, ...] | None]:
    return [reply and reply.token_ids for reply in result.replies]


def asked_afresh(model: EdgeModel, pixels: np.ndarray) -> list[tuple[int, ...]]:
    return [model.ask(pixels, question, **options).token_ids for question, options in QUESTIONS]  # type: ignore[arg-type]


def test_frames_of_any_size_are_answered_as_fresh_asks(model: EdgeModel, costs: Costs) -> None:
    made = engine(model, costs)
    for seed, size in enumerate([(40, 50), (90, 30), (40, 50), (28, 28)]):
        result = answer(made, costs, picture(seed, size))
        assert tokens(result) == asked_afresh(model, picture(seed, size))
        assert (result.changed, result.deadline_missed, result.error) == (True, False, None)
        spent = result.timings
        assert spent.vision_sec == VISION_SEC
        assert spent.total_sec == spent.vision_sec + spent.prefill_sec + spent.decode_sec == result.latency_sec
        assert min(spent.prefill_sec, spent.decode_sec) > 0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0.25, 40))
def test_work_ends_with_the_step_in_which_the_deadline_comes(model: EdgeModel, costs: Costs, deadline: float) -> None:
    made = engine(model, costs, deadline=deadline)
    whole = asked_afresh(model, picture(0))
    result = answer(made, costs, picture(0))
    latest = max(deadline, VISION_SEC) if deadline <= VISION_SEC else deadline + STEP_SEC
    assert result.timings.total_sec <= latest
    for found, expected in zip(result.replies, whole, strict=True):
        if found is not None:
            assert found.token_ids == expected[: len(found.token_ids)]
            assert (found.finish_reason == "deadline") is (len(found.token_ids) < len(expected))
    in_time = result.timings.total_sec <= deadline and tokens(result) == whole
    assert result.deadline_missed is not in_time


def test_a_deadline_that_looking_alone_misses_is_reported_every_time(model: EdgeModel, costs: Costs) -> None:
    made = engine(model, costs, deadline=VISION_SEC / 2)
    for seed in range(3):
        result = answer(made, costs, picture(seed))
        assert (result.deadline_missed, result.replies, result.error) == (True, (None, None), None)
    assert costs.log == ["look"] * 3  # and nothing is begun that could not end in time


def test_an_unchanged_picture_costs_nothing_and_gives_the_same_replies(model: EdgeModel, costs: Costs) -> None:
    made = engine(model, costs, unchanged_below=4.0)
    first = answer(made, costs, picture(0))
    costs.log.clear()
    second = answer(made, costs, (picture(0).astype(int) + 3).clip(0, 255).astype(np.uint8))
    assert costs.log == [] and second.changed is False
    assert all(new is old for new, old in zip(second.replies, first.replies, strict=True))
    assert second.timings.vision_sec == second.timings.prefill_sec == second.timings.decode_sec == 0
    third = answer(made, costs, picture(1))
    assert third.changed and tokens(third) == asked_afresh(model, picture(1))


def test_slow_changes_add_up(model: EdgeModel, costs: Costs) -> None:
    made = engine(model, costs, unchanged_below=3.5)
    grey = [answer(made, costs, np.full((40, 50, 3), 100 + level, np.uint8)).changed for level in range(9)]
    assert grey == [True, False, False, False, True, False, False, False, True]


def test_what_chance_decides_is_asked_again_from_the_kv_cache(model: EdgeModel, costs: Costs) -> None:
    drawn = {"max_new_tokens": COUNT, "temperature": 1.0}
    questions = [("Why?", drawn), ("Why?", drawn | {"seed": 1}), ("Why?", {"max_new_tokens": COUNT})]
    made = engine(model, costs, unchanged_below=4.0, questions=questions)
    first = answer(made, costs, picture(0))
    costs.log.clear()
    second = answer(made, costs, picture(0))
    assert [new is old for new, old in zip(second.replies, first.replies, strict=True)] == [False, True, True]
    assert "look" not in costs.log
    assert second.replies[0].cached_tokens >= second.replies[0].image_tokens


def test_what_the_deadline_cut_is_finished_where_the_picture_stays(model: EdgeModel, costs: Costs) -> None:
    made = engine(model, costs, unchanged_below=4.0, deadline=VISION_SEC + 3 * STEP_SEC)
    results = [answer(made, costs, picture(0)) for _ in range(8)]
    assert results[0].deadline_missed and results[0].replies[1] is None
    assert costs.log.count("look") == 1
    # A question alone takes longer than 3 steps but not longer than a deadline without looking.
    assert not results[-1].deadline_missed and tokens(results[-1]) == asked_afresh(model, picture(0))


def test_what_was_seen_too_late_is_read_with_the_next_frame(model: EdgeModel, costs: Costs) -> None:
    made = engine(model, costs, unchanged_below=4.0, deadline=VISION_SEC)
    late = answer(made, costs, picture(0))
    assert late.replies == (None, None)
    after = answer(made, costs, picture(0))
    assert costs.log.count("look") == 1
    assert after.replies[0].token_ids == asked_afresh(model, picture(0))[0]


def test_a_bad_frame_is_reported_and_the_next_one_answered(model: EdgeModel, costs: Costs) -> None:
    made = engine(model, costs, unchanged_below=4.0)
    answer(made, costs, picture(0))
    shapeless = np.zeros((0, 5, 3), np.uint8)
    for bad in (np.full((40, 50, 3), np.nan), np.zeros((40, 50), np.uint8), "absent.jpg", shapeless):
        result = answer(made, costs, bad, id="bad")
        assert isinstance(result.error, ImageError)
        assert (result.frame_id, result.replies, result.deadline_missed) == ("bad", (None, None), False)
    # The picture before is still the one that the cache holds.
    assert answer(made, costs, picture(0)).changed is False
    assert tokens(answer(made, costs, picture(1))) == asked_afresh(model, picture(1))


def test_an_error_of_one_question_leaves_the_others(model: EdgeModel, costs: Costs) -> None:
    long = ("What is this? " * 8, {"max_new_tokens": 60})
    made = engine(model, costs, questions=[long, QUESTIONS[0]], max_context=150)
    result = answer(made, costs, picture(0))
    assert isinstance(result.error, ContextLengthError) and not result.deadline_missed
    assert tokens(result) == [None, asked_afresh(model, picture(0))[0]]


def test_data_that_the_deadline_cut_is_an_error_and_missed(model: EdgeModel, costs: Costs) -> None:
    question = ("Which?", {"schema": ["a red circle", "a red square", "a blue triangle"]})
    made = engine(model, costs, questions=[question], deadline=VISION_SEC + 1.5 * STEP_SEC)
    result = answer(made, costs, picture(0))
    assert isinstance(result.error, AnswerError)
    assert result.deadline_missed and result.replies == (None,)


def test_an_error_of_one_question_hides_no_missed_deadline_of_another(model: EdgeModel, costs: Costs) -> None:
    long = ("What is this? " * 8, {"max_new_tokens": 60})
    hasty = ("Why?", {"max_new_tokens": COUNT, "deadline_sec": STEP_SEC / 2})
    result = answer(engine(model, costs, questions=[long, hasty], max_context=150), costs, picture(0))
    assert isinstance(result.error, ContextLengthError)
    assert result.replies[1].finish_reason == "deadline" and result.deadline_missed


def test_a_cancelled_frame_ends_with_the_next_piece_of_text(model: EdgeModel, costs: Costs) -> None:
    closed = []
    questions = [("What is this?", {"max_new_tokens": 40}), ("Who is there?", {"max_new_tokens": 40})]
    made = engine(model, costs, questions=questions, cancelled=lambda: bool(closed))
    costs.before = lambda: closed.append(True) if costs.log.count("step") == 3 else None
    with pytest.raises(Cancelled):
        answer(made, costs, picture(0))
    assert costs.log.count("step") < 10 and costs.log.count("read") == 2  # the picture and one question
    closed.clear()
    costs.before = lambda: None
    assert len(answer(made, costs, picture(1)).replies) == 2  # the session is as it was


@pytest.mark.parametrize(
    ("questions", "found"),
    [([("Why?", {"max_new_tokens": 0})], "max_new_tokens 0")],
)
def test_impossible_questions_are_refused_at_once(model: EdgeModel, costs: Costs, questions: list, found: str) -> None:
    with pytest.raises(RequestError, match=found):
        engine(model, costs, questions=questions)


def reading_of(frame: Frame, number: int = 0) -> Reading:
    return Reading(frame, number, 0.0, 0.0)


def test_questions_of_the_moment_share_the_look_and_the_cache_with_the_frames(model: EdgeModel, costs: Costs) -> None:
    made = engine(model, costs)
    first, second = (reading_of(Frame(picture(seed)), seed) for seed in range(2))
    other = [("Why?", {"max_new_tokens": COUNT})]
    whole = [model.ask(picture(seed), *other[0][:1], **other[0][1]).token_ids for seed in range(2)]
    assert tokens(made.answer(Taken(first, 0, costs()))) == asked_afresh(model, picture(0))
    costs.log.clear()
    asked = made.ask(first, other)
    assert tokens(asked) == [whole[0]] and asked.frame_id == 0 and asked.changed is False
    assert costs.log.count("look") == 0 and costs.log.count("read") == 1  # the question alone
    assert asked.replies[0].cached_tokens >= asked.replies[0].image_tokens
    # A frame that a question looked at is not looked at again for the watch, whose result is of a new picture.
    costs.log.clear()
    early = made.ask(second, other)
    assert tokens(early) == [whole[1]] and early.changed and costs.log.count("look") == 1
    answered = made.answer(Taken(second, 0, costs()))
    assert tokens(answered) == asked_afresh(model, picture(1)) and answered.changed
    assert costs.log.count("look") == 1 and answered.timings.vision_sec == 0
    with pytest.raises(RequestError, match="no questions"):
        made.ask(second, [])
    with pytest.raises(RequestError, match="max_new_tokens 0"):
        made.ask(second, [("Why?", {"max_new_tokens": 0})])


def test_a_question_of_the_moment_has_the_deadline_from_its_turn_on(model: EdgeModel, costs: Costs) -> None:
    made = engine(model, costs, deadline=VISION_SEC + 4 * STEP_SEC, questions=())
    costs.sec = 1000.0
    late = made.ask(reading_of(Frame(picture(0))), [("Why?", {"max_new_tokens": 40})])
    assert late.deadline_missed and late.replies[0].finish_reason == "deadline"
    again = made.ask(reading_of(Frame(np.zeros((3, 3), np.uint8))), ["Why?"])
    assert isinstance(again.error, ImageError) and again.replies == (None,)


def test_a_result_says_which_frame_it_is_about(model: EdgeModel, costs: Costs) -> None:
    made = engine(model, costs)
    costs.sec = 50.0
    reading = Reading(Frame(picture(0), stamp_sec=7.5), number=12, wall_sec=1e9, monotonic_sec=48.0)
    result = made.answer(Taken(reading, dropped=3, monotonic_sec=50.0))
    assert (result.frame_id, result.stamp_sec, result.captured_at, result.dropped) == (12, 7.5, 1e9, 3)
    assert (result.captured_monotonic_sec, result.age_sec) == (48.0, 2.0)
    assert result.latency_sec == 2.0 + result.timings.total_sec
    assert answer(made, costs, picture(0), id="0007.png").frame_id == "0007.png"
