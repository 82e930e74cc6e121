"""Workers that answer in turn, and what is left when one does not."""

from __future__ import annotations

import sys

import pytest

from vz_edge.errors import MeasurementError
from vz_edge.profiling import processes
from vz_edge.profiling.processes import interleave, workers

WORKER = """
import sys, time
from vz_edge.errors import ImageError
from vz_edge.profiling.processes import serve
def handle(request):
    if "fail" in request:
        raise ImageError("nothing to see")
    if "end" in request:
        sys.exit(request["end"])
    return {"name": NAME, "twice": 2 * request["value"], "at": time.monotonic()}
def prepare():
    print("what a library prints while it loads")
    return handle
serve(prepare)
"""


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SETTLE_SEC", 0.0)


def command(name: str) -> list[str]:
    return [sys.executable, "-c", WORKER.replace("NAME", repr(name))]


def test_rounds_alternate_and_the_first_is_not_kept() -> None:
    told: list[object] = []
    with workers({"a": command("a"), "b": command("b")}, threads=1, starting=told.append) as rivals:
        answers = interleave(rivals, {"value": 4}, rounds=2, asking=lambda name, number: told.append((name, number)))
    assert told == ["a", "b", ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [(answer["name"], answer["twice"]) for answer in answers["a"]] == [("a", 8)] * 2
    order = sorted((answer["at"], name) for name, given in answers.items() for answer in given)
    assert [name for _, name in order] == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [({"fail": 1}, "^nothing to see$"), ({"end": 3}, "ended with status 3"), ({"value": "x", "end": 0}, "status 0")],
)
def test_a_worker_that_fails_says_why(request_: dict, message: str) -> None:
    with workers({"a": command("a")}, threads=1) as rivals, pytest.raises(MeasurementError, match=message):
        rivals["a"].ask(request_)


def test_one_that_cannot_start_ends_those_that_did() -> None:
    broken = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    started: list[processes.Worker] = []
    original = processes.Worker

    def remember(*arguments: object) -> processes.Worker:
        started.append(original(*arguments))  # type: ignore[arg-type]
        return started[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "Worker", remember)
        with (
            pytest.raises(MeasurementError, match="most likely because memory ran out"),
            workers({"a": command("a"), "b": broken}, threads=1),
        ):
            pass
    assert len(started) == 1 and started[0]._process.returncode == 0
