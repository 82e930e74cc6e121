"""Every frame that was read is taken or dropped, and counted; nothing that ends a source is lost."""

from __future__ import annotations

import threading
from collections.abc import Generator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.watch.camera import PATIENCE_SEC
from vz_edge.errors import RequestError, SourceError
from vz_edge.metrics import Metrics
from vz_edge.watch.frame import Frame
from vz_edge.watch.reader import Slot, read
from vz_edge.watch.source import Delivery
from vz_edge.watch.watch_metrics import WatchMetrics

PIXELS = np.zeros((1, 1, 3), np.uint8)


class Stamps:
    """A source of frames with these stamps."""

    def __init__(self, delivery: Delivery, *stamps: float | None) -> None:
        self.delivery = delivery
        self.stamps = stamps

    def frames(self) -> Generator[Frame, None, None]:
        for stamp in self.stamps:
            yield Frame(PIXELS, stamp_sec=stamp)


class Hands:
    """A clock that goes on only when ``sec`` is moved."""

    def __init__(self) -> None:
        self.sec = 100.0

    def __call__(self) -> float:
        return self.sec


def make_slot(waits: bool, clock: Hands | None = None) -> tuple[Slot, Metrics]:
    metrics = Metrics()
    return Slot(waits, WatchMetrics(metrics).frames, clock or Hands()), metrics


def counts(metrics: Metrics) -> tuple[int, int, int]:
    """Frames read, taken and dropped."""
    samples = metrics.as_dict()
    read, taken, dropped = (int(samples[f"vz_edge_watch_frames_{name}_total"]) for name in ("read", "taken", "dropped"))
    return read, taken, dropped


def taken_stamps(slot: Slot) -> list[float | None]:
    stamps = []
    while found := slot.take(None):
        stamps.append(found.reading.frame.stamp_sec)
    return stamps


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["put", "put", "take", "close"]), max_size=30))
def test_any_course_of_a_live_slot_counts_every_frame(steps: list[str]) -> None:
    slot, metrics = make_slot(waits=False)
    number, newest, since, closed = 0, None, 0, False
    for step in steps:
        if step == "put":
            assert slot.put(Frame(PIXELS, id=number)) is not closed
            if not closed:
                since += newest is not None
                newest, number = number, number + 1
        elif step == "take" and closed:
            assert slot.take(None) is None
        elif step == "take" and newest is not None:
            taken = slot.take(None)
            assert (taken.reading.frame.id, taken.reading.number, taken.dropped) == (newest, newest, since)
            newest, since = None, 0
        elif step == "close":
            slot.close()
            closed, newest = True, None
        read_count, taken_count, dropped = counts(metrics)
        assert read_count == number == taken_count + dropped + (newest is not None)


def test_a_recorded_source_waits_for_every_frame_to_be_taken() -> None:
    slot, metrics = make_slot(waits=True)
    reader = threading.Thread(target=read, args=(Stamps("recorded", *range(20)), slot, None))
    reader.start()
    assert taken_stamps(slot) == list(range(20))
    reader.join(PATIENCE_SEC)
    assert counts(metrics) == (20, 20, 0)


@pytest.mark.parametrize("every", [0.1, 0.3, 1.0])
def test_of_a_recording_frames_are_taken_by_their_stamps(every: float) -> None:
    stamps = [1_700_000_000 + i / 10 for i in range(31)]
    slot, metrics = make_slot(waits=True)
    reader = threading.Thread(target=read, args=(Stamps("recorded", *stamps), slot, every))
    reader.start()
    assert taken_stamps(slot) == stamps[:: round(every * 10)]
    reader.join(PATIENCE_SEC)
    read_count, taken, dropped = counts(metrics)
    assert (read_count, dropped) == (31, 31 - taken)


def test_stamps_that_go_back_begin_anew() -> None:
    slot, _ = make_slot(waits=True)
    reader = threading.Thread(target=read, args=(Stamps("recorded", 5.0, 5.5, 6.0, 1.0, 1.5, 2.0), slot, 1.0))
    reader.start()
    assert taken_stamps(slot) == [5.0, 6.0, 1.0, 2.0]
    reader.join(PATIENCE_SEC)


def test_a_replay_keeps_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Hands()
    slot, _ = make_slot(waits=False, clock=clock)
    puts, pauses = [], []
    monkeypatch.setattr(slot, "pause", lambda until: pauses.append(until) or setattr(clock, "sec", until))
    monkeypatch.setattr(slot, "put", lambda frame: puts.append(clock()) or True)
    read(Stamps("replayed", 7.0, 7.5, 9.0), slot, None, clock)
    assert puts == pauses == [100.0, 100.5, 102.0]


def test_a_replay_needs_stamps() -> None:
    slot, _ = make_slot(waits=False)
    read(Stamps("replayed", None), slot, None)
    with pytest.raises(RequestError, match="needs frames with time stamps"):
        slot.take(None)


def test_of_recorded_frames_without_stamps_every_passes_over_none(caplog: pytest.LogCaptureFixture) -> None:
    slot, metrics = make_slot(waits=False)
    read(Stamps("recorded", None, None, None), slot, every=0.5)
    assert counts(metrics)[0] == 3
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "every=0.5 passes over none of these frames, which have no time stamps"
    ]


def test_a_pause_ends_with_the_clock_or_with_the_watch() -> None:
    clock = Hands()
    slot, _ = make_slot(waits=False, clock=clock)
    slot.pause(until=100.0)
    slot.close()
    slot.pause(until=1e9)


def test_who_waits_for_a_frame_goes_on_when_the_slot_is_closed() -> None:
    slot, _ = make_slot(waits=False)
    found: list = ["nothing yet"]
    consumer = threading.Thread(target=lambda: found.append(slot.take(None)))
    consumer.start()
    slot.close()
    consumer.join(PATIENCE_SEC)
    assert found == ["nothing yet", None]


def test_a_source_that_gives_nothing_for_too_long_has_stalled() -> None:
    clock = Hands()
    slot, _ = make_slot(waits=False, clock=clock)
    slot.put(Frame(PIXELS))
    clock.sec += 5
    assert slot.take(3.0) is not None  # it was there all the time
    clock.sec += 3
    with pytest.raises(SourceError, match="no frame for 3 s"):
        slot.take(3.0)


class Failing(Stamps):
    failure: BaseException

    def frames(self) -> Generator[Frame, None, None]:
        yield from super().frames()
        raise self.failure


@pytest.mark.parametrize("failure", [OSError("unplugged"), SystemExit(3), SourceError("it is gone; plug it in")])
def test_what_a_source_fails_with_comes_after_its_last_frame(failure: BaseException) -> None:
    slot, _ = make_slot(waits=False)
    source = Failing("live", 1.0)
    source.failure = failure
    read(source, slot, None)
    assert slot.take(None) is not None
    with pytest.raises(SourceError, match=r"unplugged|SystemExit: 3|plug it in"):
        slot.take(None)
    assert slot.take(None) is None


def test_an_empty_source_is_an_error() -> None:
    slot, _ = make_slot(waits=False)
    read(Stamps("live"), slot, None)
    with pytest.raises(SourceError, match="no frames"):
        slot.take(None)
