"""A whole watch: newest frames, every front end, and an end that leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.device import standin
from tests.watch.camera import END, PATIENCE_SEC, Camera, picture
from vz_edge.device.fake_decoder import FakeContext, FakeDecoder
from vz_edge.device.model import EdgeModel
from vz_edge.errors import BudgetError, ImageError, RequestError, SourceError
from vz_edge.metrics import Metrics
from vz_edge.watch import Frame, IteratorSource, Result, Watch
from vz_edge.watch import watch as watch_module

QUESTIONS = [("What is this?", {"max_new_tokens": 4}), ("Who is there?", {"max_new_tokens": 4})]


def counts(watch: Watch) -> dict[str, int]:
    names = ("read", "taken", "dropped", "unchanged")
    samples = watch.metrics.as_dict()
    return {name: int(samples[f"vz_edge_watch_frames_{name}_total"]) for name in names}


def tokens(result: Result) -> list[tuple[int, ...] | None]:
    return [reply and reply.token_ids for reply in result.replies]


def asked_afresh(model: EdgeModel, pixels: np.ndarray) -> list[tuple[int, ...]]:
    return [model.ask(pixels, question, **options).token_ids for question, options in QUESTIONS]  # type: ignore[arg-type]


class Decoder(FakeDecoder):
    """Calls ``before`` before it reads anything."""

    before: Callable[[], object]

    def start(self, capacity: int) -> FakeContext:
        return Context(self, capacity)


class Context(FakeContext):
    def append(self, embeds: np.ndarray) -> np.ndarray:
        self._decoder.before()  # type: ignore[attr-defined]
        return super().append(embeds)


def hooked(model: EdgeModel) -> tuple[EdgeModel, Decoder]:
    decoder = Decoder(standin.HIDDEN, standin.VOCAB)
    decoder.before = lambda: None
    parts = (model.manifest, model.vision, model.chat, model.embedding, decoder)
    return EdgeModel(*parts, context_length=4000, load_sec=0.0), decoder


def test_the_newest_frame_is_answered_and_the_others_are_counted(model: EdgeModel) -> None:
    camera = Camera(picture(0))
    with model.watch(camera, QUESTIONS) as watch:
        first = next(watch)
        assert (first.frame_id, first.dropped, tokens(first)) == (0, 0, asked_afresh(model, picture(0)))
        camera.give(*map(picture, (1, 2, 3)))
        newest = next(watch)
        assert (newest.frame_id, newest.dropped, tokens(newest)) == (3, 2, asked_afresh(model, picture(3)))
        camera.give(*map(picture, (4, 5)))
        assert counts(watch) == {"read": 6, "taken": 2, "dropped": 3, "unchanged": 0}  # and one waits
        camera.queue(END)
    assert counts(watch) == {"read": 6, "taken": 2, "dropped": 4, "unchanged": 0}
    assert camera.released
    assert list(watch) == []


def test_frames_of_changing_size_bad_ones_and_a_still_scene(model: EdgeModel) -> None:
    grey = np.full((40, 50), 9, np.uint8)
    frames = [Frame(grey, "gray"), grey[..., None].repeat(3, 2), np.full((4, 4, 3), np.nan), picture(1, (90, 30)), grey]
    watch = model.watch(frames, QUESTIONS, unchanged_below=4.0)
    results = list(watch)
    assert [result.changed for result in results] == [True, False, True, True, True]
    assert [isinstance(result.error, ImageError) for result in results] == [False, False, True, False, True]
    assert tokens(results[0]) == tokens(results[1]) == asked_afresh(model, np.full((40, 50, 3), 9, np.uint8))
    assert tokens(results[3]) == asked_afresh(model, picture(1, (90, 30)))
    assert counts(watch) == {"read": 5, "taken": 5, "dropped": 0, "unchanged": 1}
    samples = watch.metrics.as_dict()
    assert samples["vz_edge_watch_frame_errors_total"] == 2
    assert samples["vz_edge_watch_latency_seconds_count"] == 5
    assert samples["vz_edge_watch_vision_seconds_sum"] == sum(result.timings.vision_sec for result in results)


def test_colours_are_the_callers_word(model: EdgeModel) -> None:
    results = list(model.watch([picture(0)[..., ::-1]], QUESTIONS, color="bgr"))
    assert tokens(results[0]) == asked_afresh(model, picture(0))


def test_every_waits_for_its_time_and_takes_the_newest_then(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    camera = Camera(picture(0))
    sec = 100.0
    watch = Watch(model, IteratorSource(camera), QUESTIONS, every=0.5, clock=lambda: sec)
    pauses = []

    def pause(until: float) -> None:
        nonlocal sec
        pauses.append(until)
        if until > sec:
            camera.give(picture(len(pauses)), picture(len(pauses)))
            sec = until

    monkeypatch.setattr(watch._slot, "pause", pause)
    with watch:
        results = [next(watch) for _ in range(3)]
        assert [(result.frame_id, result.dropped) for result in results] == [(0, 0), (2, 1), (4, 1)]
        camera.queue(END)
    assert pauses == [-float("inf"), 100.5, 101.0]


def test_a_deadline_that_is_always_missed_is_warned_of_once(model: EdgeModel) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        watch = model.watch([picture(0)] * 25, QUESTIONS, deadline=1e-6)
        results = list(watch)
    assert all(result.deadline_missed and result.replies == (None, None) for result in results)
    assert watch.metrics.as_dict()["vz_edge_watch_deadline_missed_total"] == 25
    assert ["10 frames in succession missed their deadline" in str(found.message) for found in warned] == [True]


def test_a_questions_own_deadline_is_missed_too(model: EdgeModel) -> None:
    with pytest.warns(RuntimeWarning, match="10 frames"):
        results = list(model.watch([picture(0)] * 10, [("Why?", {"deadline_sec": 1e-6})]))
    assert all(result.deadline_missed for result in results)
    assert {result.replies[0].finish_reason for result in results if result.replies[0]} == {"deadline"}


def test_a_source_that_fails_ends_the_watch_after_its_last_frame(model: EdgeModel) -> None:
    watch = model.watch(Camera(picture(0), OSError("unplugged")), QUESTIONS)
    assert next(watch).frame_id == 0
    with pytest.raises(SourceError, match=r"failed after 1 frames \(OSError: unplugged\)"):
        next(watch)
    assert list(watch) == []


@pytest.mark.parametrize("source", [[], iter(())])
def test_an_empty_source_is_an_error(model: EdgeModel, source: Any) -> None:
    with pytest.raises(SourceError, match="has no frames"):
        list(model.watch(source, QUESTIONS))


def test_a_camera_that_stops_is_an_error_and_is_left_behind(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "CLOSE_SEC", 0.001)
    camera = Camera(picture(0))
    with (
        pytest.warns(RuntimeWarning, match="could not be ended"),
        model.watch(camera, QUESTIONS, stalled_after=0.01) as watch,
    ):
        next(watch)
        with pytest.raises(SourceError, match="no frame for"):
            next(watch)
    camera.queue(END)


def test_time_before_the_first_result_is_no_stall(model: EdgeModel) -> None:
    sec, asked_for_the_time = 0.0, threading.Event()

    def clock() -> float:
        asked_for_the_time.set()
        return sec

    def frames() -> Iterator[np.ndarray]:
        asked_for_the_time.wait(PATIENCE_SEC)
        yield picture(0)

    watch = Watch(model, IteratorSource(frames()), QUESTIONS, stalled_after=10.0, clock=clock)
    sec = 60.0
    asked_for_the_time.clear()
    assert [result.frame_id for result in watch] == [0]


def test_a_lost_device_ends_the_watch(model: EdgeModel) -> None:
    broken, decoder = hooked(model)

    def lose() -> None:
        raise RuntimeError("the device was lost")

    watch = broken.watch([picture(0), picture(1)], QUESTIONS)
    decoder.before = lose
    with pytest.raises(RuntimeError, match="lost"):
        next(watch)
    assert list(watch) == []
    assert counts(watch)["read"] == counts(watch)["taken"] + counts(watch)["dropped"]


def test_closing_from_another_thread_ends_an_answer_that_is_being_written(model: EdgeModel) -> None:
    slow, decoder = hooked(model)
    watch = slow.watch([picture(0), picture(1)], [("Why?", {"max_new_tokens": 3000})])
    steps: list[int] = []
    writing = threading.Event()

    def step() -> None:
        steps.append(1)
        if len(steps) == 5:
            writing.set()
            while not watch._slot.closed:
                time.sleep(0.001)

    decoder.before = step
    closer = threading.Thread(target=lambda: writing.wait(PATIENCE_SEC) and watch.close())
    closer.start()
    assert list(watch) == []
    closer.join(PATIENCE_SEC)
    assert 5 <= len(steps) < 15
    assert counts(watch)["taken"] == 1


def test_a_watch_that_is_forgotten_ends_its_thread(model: EdgeModel) -> None:
    def frames() -> Iterator[np.ndarray]:
        while True:
            yield picture(0, (4, 4))

    for _ in model.watch(frames(), QUESTIONS):
        break
    gc.collect()  # the fixture sees that no thread is left


def test_a_watch_that_is_closed_before_it_begins_reads_nothing(model: EdgeModel) -> None:
    camera = Camera(picture(0))
    watch = model.watch(camera, QUESTIONS)
    watch.close()
    watch.close()
    assert list(watch) == [] and counts(watch)["read"] == 0


def test_in_the_background_each_result_is_handed_over(model: EdgeModel) -> None:
    results: list[Result] = []
    background = model.watch([picture(seed) for seed in range(3)], QUESTIONS).background(results.append)
    assert background.join(PATIENCE_SEC)
    assert [tokens(result) for result in results] == [asked_afresh(model, picture(seed)) for seed in range(3)]


def test_the_background_raises_what_it_ended_with(model: EdgeModel) -> None:
    with pytest.raises(SourceError, match="no frames"):
        model.watch([], QUESTIONS).background(print).join(PATIENCE_SEC)
    with pytest.raises(ZeroDivisionError), model.watch([picture(0)], QUESTIONS).background(lambda _: 1 / 0) as failing:
        failing.join(PATIENCE_SEC)


def test_the_callback_may_end_the_watch(model: EdgeModel) -> None:
    seen = []
    ready = threading.Event()

    def on_result(result: Result) -> None:
        ready.wait(PATIENCE_SEC)
        seen.append(result)
        background.close()

    background = model.watch([picture(0)] * 3, QUESTIONS).background(on_result)
    ready.set()
    assert background.join(PATIENCE_SEC) and len(seen) == 1


def test_asyncio_sees_the_same_results_and_other_tasks_go_on(model: EdgeModel) -> None:
    async def run() -> list[Result]:
        async with model.watch([picture(seed) for seed in range(3)], QUESTIONS) as watch:
            return [result async for result in watch]

    results = asyncio.run(run())
    assert [tokens(result) for result in results] == [asked_afresh(model, picture(seed)) for seed in range(3)]


def test_a_cancelled_task_ends_the_watch(model: EdgeModel) -> None:
    camera = Camera(picture(0))

    async def consume(watch: Watch, seen: asyncio.Event) -> None:
        async with watch:
            try:
                async for _ in watch:
                    seen.set()
            finally:
                camera.queue(END)

    async def run() -> Watch:
        watch, seen = model.watch(camera, QUESTIONS), asyncio.Event()
        task = asyncio.create_task(consume(watch, seen))
        await asyncio.wait_for(seen.wait(), PATIENCE_SEC)
        task.cancel()  # while it waits for a second frame
        with pytest.raises(asyncio.CancelledError):
            await task
        return watch

    watch = asyncio.run(run())
    assert list(watch) == [] and camera.released


def test_asyncio_gets_the_errors_too(model: EdgeModel) -> None:
    async def run() -> None:
        async for _ in model.watch([], QUESTIONS):
            pass

    with pytest.raises(SourceError, match="no frames"):
        asyncio.run(run())


def test_two_watches_may_share_metrics(model: EdgeModel) -> None:
    metrics = Metrics()
    for _ in range(2):
        list(model.watch([picture(0)], QUESTIONS, metrics=metrics))
    assert metrics.as_dict()["vz_edge_watch_frames_taken_total"] == 2


@pytest.mark.parametrize("option", ["every", "deadline", "stalled_after", "unchanged_below"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_impossible_settings_are_refused(model: EdgeModel, option: str, value: float) -> None:
    with pytest.raises(RequestError, match=option):
        model.watch([picture(0)], QUESTIONS, **{option: value})  # type: ignore[arg-type]


def test_a_budget_that_is_not_there_is_refused_before_the_first_frame(model: EdgeModel) -> None:
    with pytest.raises(BudgetError, match="has budgets of 20 tokens, not of 15"):
        model.watch([picture(0)], QUESTIONS, tokens=15)
    assert next(model.watch([picture(0)], QUESTIONS, tokens=20)).error is None


def test_one_question_needs_no_list_and_a_system_prompt_is_heard(model: EdgeModel) -> None:
    result = next(model.watch([picture(0)], "Why?", system="Be brief."))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert result.replies[0].token_ids == model.ask(picture(0), messages).token_ids  # type: ignore[union-attr, arg-type]
