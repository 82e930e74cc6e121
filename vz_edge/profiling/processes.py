"""What is measured runs in a process of its own, and rounds alternate between rivals.

A rival is loaded before the first round, so that no run pays for loading and no library's threads disturb another's.
Rounds are interleaved: drift of the machine hits all alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from vz_edge.errors import MeasurementError, VzEdgeError

SETTLE_SEC = 0.5  # spinning worker threads of the previous rival go to sleep


class Worker:
    """A rival in its own process: one line of JSON goes in, one comes out (see ``serve``).

    Starting waits until it is prepared. Raises MeasurementError with the process's own error, or where it ended.
    """

    def __init__(self, command: Sequence[str], threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._command = command
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send ``request``, return the answer. Raises MeasurementError."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended, which reading finds out
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            reason = "was killed, most likely because memory ran out" if status == -9 else f"ended with status {status}"
            raise MeasurementError(f"the process that was measured {reason} ({' '.join(self._command)})")
        answer = json.loads(line)
        if "error" in answer:
            raise MeasurementError(answer["error"])
        return answer


def serve(prepare: Callable[[], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """The worker's side: prepare, say so, answer requests until the input ends.

    What libraries print goes to stderr: standard output carries answers only. An error of this package is an answer,
    and the last one.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        handle = prepare()
        say({"ready": True})
        for line in sys.stdin:
            say(handle(json.loads(line)))
    except VzEdgeError as error:
        say({"error": str(error)})


@contextmanager
def workers(
    commands: Mapping[str, Sequence[str]], threads: int, starting: Callable[[str], None] = lambda name: None
) -> Iterator[dict[str, Worker]]:
    """Start a worker for each command, one after the other; all have loaded when the block begins.

    ``starting(name)`` is called before each.
    """
    with ExitStack() as stack:
        started = {}
        for name, command in commands.items():
            starting(name)
            started[name] = Worker(command, threads)
            stack.callback(started[name].close)
        yield started


def interleave(
    rivals: Mapping[str, Worker],
    request: dict[str, Any],
    rounds: int,
    asking: Callable[[str, int], None] = lambda name, number: None,
) -> dict[str, list[dict[str, Any]]]:
    """Ask every worker the same in turn, ``rounds`` times after one round that warms up and is not kept.

    ``asking(name, round)`` is called before each; round 0 is the one that warms up.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, worker in rivals.items():
            asking(name, number)
            time.sleep(SETTLE_SEC)
            answer = worker.ask(request)
            if number:
                answers[name].append(answer)
    return answers
