"""Frames that are pushed in: whatever is asked about one, it is looked at and read once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.device import standin
from tests.watch.camera import PATIENCE_SEC, picture
from vz_edge.budget import TokenBudget
from vz_edge.device.fake_decoder import FakeContext, FakeDecoder
from vz_edge.device.image import ImageSource, Tiles
from vz_edge.device.model import EdgeModel
from vz_edge.device.vision import VisionResult
from vz_edge.errors import RequestError
from vz_edge.serve.robot import CameraSettings, PushedCamera
from vz_edge.watch import Frame, Result

WATCHED = ("What is this?", {"max_new_tokens": 4})
OTHER = ("Who is there?", {"max_new_tokens": 4})


class Eyes:
    """The stand-in's vision; counts looks, and stops before one while ``shut``."""

    def __init__(self, model: EdgeModel) -> None:
        self.model = model
        self.looks = 0
        self.looking, self.open = threading.Event(), threading.Event()
        self.open.set()

    def tile(self, source: ImageSource) -> Tiles:
        return self.model.vision.tile(source)

    def encode(self, tiles: Tiles, budget: TokenBudget | None = None) -> VisionResult:
        self.looks += 1
        self.looking.set()
        assert self.open.wait(PATIENCE_SEC)
        return self.model.vision.encode(tiles, budget)


class Sessions(FakeDecoder):
    """Counts KV caches."""

    started = 0

    def start(self, capacity: int) -> FakeContext:
        self.started += 1
        return super().start(capacity)


class Robot:
    """A camera whose results are kept."""

    def __init__(self, model: EdgeModel, questions: tuple[Any, ...], settings: CameraSettings) -> None:
        self.eyes, self.decoder = Eyes(model), Sessions(standin.HIDDEN, standin.VOCAB)
        parts = (model.manifest, self.eyes, model.chat, model.embedding, self.decoder)
        self.results: list[Result] = []
        self._changed = threading.Condition()
        self.camera = PushedCamera(EdgeModel(*parts, 4000, load_sec=0.0), questions, settings, self._keep)

    def _keep(self, result: Result) -> None:
        with self._changed:
            self.results.append(result)
            self._changed.notify_all()

    def wait(self, count: int) -> list[Result]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.results) >= count, PATIENCE_SEC)
            return list(self.results)


@pytest.fixture(scope="module")
def model(bundle: Path) -> EdgeModel:
    """The stand-in with the decoder of the robots."""
    loaded = EdgeModel.load(bundle, threads=1)
    decoder = FakeDecoder(standin.HIDDEN, standin.VOCAB)
    return EdgeModel(loaded.manifest, loaded.vision, loaded.chat, loaded.embedding, decoder, 4000, load_sec=0.0)


@pytest.fixture
def robots(model: EdgeModel) -> Iterator[Any]:
    made: list[Robot] = []

    def make(*questions: Any, **settings: Any) -> Robot:
        made.append(Robot(model, questions, CameraSettings(**settings)))
        return made[-1]

    yield make
    for robot in made:
        robot.eyes.open.set()
        robot.camera.close()


def text(model: EdgeModel, seed: int, question: tuple[str, Any]) -> str:
    return model.ask(picture(seed), question[0], **question[1]).text


def texts(result: Result) -> list[str | None]:
    return [reply and reply.text for reply in result.replies]


def test_a_pushed_question_is_answered_from_the_watchs_own_cache(model: EdgeModel, robots: Any) -> None:
    robot = robots(WATCHED)
    robot.camera.put(Frame(picture(0)))
    assert texts(robot.wait(1)[0]) == [text(model, 0, WATCHED)]
    for question in (OTHER, WATCHED):
        asked = robot.camera.ask([question])
        assert texts(asked) == [text(model, 0, question)] and (asked.frame_id, asked.error) == (0, None)
        assert asked.replies[0].cached_tokens >= asked.replies[0].image_tokens  # the picture was not read again
        assert asked.timings.vision_sec == asked.timings.preprocess_sec == 0
    assert (robot.eyes.looks, robot.decoder.started) == (1, 1)
    robot.camera.put(Frame(picture(1)))
    assert texts(robot.wait(2)[1]) == [text(model, 1, WATCHED)]


def test_a_question_about_a_frame_that_waits_goes_first_and_is_its_look(model: EdgeModel, robots: Any) -> None:
    robot = robots(WATCHED)
    robot.eyes.open.clear()
    robot.camera.put(Frame(picture(0)))
    assert robot.eyes.looking.wait(PATIENCE_SEC)  # the watch is at work on it
    robot.camera.put(Frame(picture(1)))
    asked: list[Result] = []
    asker = threading.Thread(target=lambda: asked.append(robot.camera.ask([OTHER])))
    asker.start()
    robot.eyes.open.set()
    asker.join(PATIENCE_SEC)
    assert texts(asked[0]) == [text(model, 1, OTHER)] and asked[0].frame_id == 1
    first, second = robot.wait(2)
    assert (texts(first), texts(second)) == ([text(model, 0, WATCHED)], [text(model, 1, WATCHED)])
    assert first.changed and second.changed and robot.eyes.looks == 2


def test_without_configured_questions_frames_are_looked_at_when_asked_about(model: EdgeModel, robots: Any) -> None:
    robot = robots()
    with pytest.raises(RequestError, match="no picture has come"):
        robot.camera.ask([OTHER])
    for seed in range(3):
        robot.camera.put(Frame(picture(seed)))
    for question in (OTHER, WATCHED):
        assert texts(robot.camera.ask([question])) == [text(model, 2, question)]
    assert (robot.eyes.looks, robot.decoder.started) == (1, 1)


def test_a_scene_that_stands_still_is_not_read_for_a_question_either(model: EdgeModel, robots: Any) -> None:
    robot = robots(WATCHED, unchanged_below=8.0)
    robot.camera.put(Frame(picture(0)))
    robot.wait(1)
    robot.camera.put(Frame(picture(0) // 2 * 2))
    assert texts(robot.camera.ask([OTHER])) == [text(model, 0, OTHER)]
    assert robot.wait(2)[1].changed is False and robot.eyes.looks == 1


def test_many_questions_beside_many_frames_are_answered_as_fresh_ones(model: EdgeModel, robots: Any) -> None:
    robot = robots(WATCHED)
    expected: dict[str, list[str]] = {}
    for name in ("Why?", "What?"):
        expected[name] = [text(model, seed, (name, {"max_new_tokens": 3})) for seed in range(4)]
    wrong: list[Any] = []

    def ask(name: str) -> None:
        for _ in range(12):
            result = robot.camera.ask([(name, {"max_new_tokens": 3})])
            if result.error or texts(result) != [expected[name][int(result.frame_id) % 4]]:
                wrong.append(result)

    robot.camera.put(Frame(picture(0)))
    threads = [threading.Thread(target=ask, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    number = 1
    while any(thread.is_alive() for thread in threads):
        robot.camera.put(Frame(picture(number % 4)))
        number += 1
        threads[0].join(0.002)
    assert wrong == []
    for result in robot.wait(1):
        assert texts(result) == [text(model, int(result.frame_id) % 4, WATCHED)]


def test_a_question_at_the_end_is_told_so(robots: Any) -> None:
    robot = robots(WATCHED)
    robot.camera.put(Frame(picture(0)))
    robot.wait(1)
    robot.camera.close()
    with pytest.raises(RequestError, match="was closed before the answer"):
        robot.camera.ask([OTHER])
