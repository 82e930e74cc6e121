"""The turn is one thread's at a time, and an urgent one does not wait for who takes it again and again."""

from __future__ import annotations

import threading
import time

import pytest

from tests.watch.camera import PATIENCE_SEC
from vz_edge.watch.turns import Turns


def test_an_urgent_one_goes_before_those_that_stand_in_line() -> None:
    turns, order = Turns(), list[str]()

    def take(name: str) -> None:
        with turns.take(urgent=name == "urgent"):
            order.append(name)

    threads = [threading.Thread(target=take, args=(name,)) for name in ("patient", "urgent")]
    with turns.take():
        for thread in threads:
            thread.start()
        while turns._urgent == 0:  # until the urgent one stands in line
            time.sleep(0.001)
    for thread in threads:
        thread.join(PATIENCE_SEC)
    assert order == ["urgent", "patient"]


def test_who_takes_it_again_and_again_lets_an_urgent_one_in() -> None:
    turns, stop, got = Turns(), threading.Event(), threading.Event()

    def greedy() -> None:
        while not stop.is_set():
            with turns.take():
                pass

    def urgent() -> None:
        with turns.take(urgent=True):
            got.set()

    threads = [threading.Thread(target=greedy), threading.Thread(target=urgent)]
    for thread in threads:
        thread.start()
    assert got.wait(PATIENCE_SEC)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE_SEC)


def test_an_error_gives_the_turn_back() -> None:
    turns = Turns()
    with pytest.raises(ValueError), turns.take(urgent=True):
        raise ValueError
    with turns.take():
        pass
