"""Measuring other processes: peak memory of a command, and rounds interleaved between rivals.

Peak resident memory of a command is the kernel's high-water mark (``VmHWM``, which forgets nothing between two
polls) of the largest process of its tree. Pages of memory-mapped files count as resident, as they do for a user who
looks. Readings are not summed over the tree, since a process and its fork share pages, and ``ru_maxrss`` is not used,
since a process inherits the mark of the one that started it.

Rivals run in a process of their own each, ready before the first round, so that no run pays for loading and
no library's threads disturb another's. Rounds alternate between them: drift of the machine hits all alike.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

POLL_SEC = 0.02
SETTLE_SEC = 0.5  # spinning worker threads of the previous rival go to sleep


@dataclass(frozen=True)
class Run:
    """One finished command. ``cpu_sec`` is processor time, its children's too; it suffers less from neighbours."""

    wall_sec: float
    cpu_sec: float
    peak_bytes: int


def run_measured(command: Sequence[str], log: Path) -> Run:
    """Run ``command`` with its output in ``log``; exit with the log's end where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    cpu_before_sec = _children_cpu_sec()
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        peak_bytes = 0
        while process.poll() is None:
            peak_bytes = max(peak_bytes, _tree_peak_bytes(process.pid))
            time.sleep(POLL_SEC)
    wall_sec = time.perf_counter() - start
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}:\n{tail}")
    return Run(wall_sec, _children_cpu_sec() - cpu_before_sec, peak_bytes)


def _children_cpu_sec() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def memory_bytes(pid: int | str = "self") -> dict[str, int]:
    """VmHWM, VmRSS, RssAnon and RssFile of a process in bytes; empty where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    wanted = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    return {name: int(fields[name].split()[0]) * 1024 for name in wanted if name in fields}


def _tree_peak_bytes(pid: int) -> int:
    return max((memory_bytes(process).get("VmHWM", 0) for process in _tree(pid)), default=0)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in children:
        yield from _tree(int(child))


class Worker:
    """A rival in its own process: one line of JSON goes in, one comes out (see ``serve``)."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()

    def ask(self, request: dict) -> dict:
        """Send ``request``, return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self._process.args)} ended with status {self._process.wait()}")  # type: ignore[arg-type]
        return json.loads(line)


def serve(prepare: Callable[[], Callable[[dict], dict]]) -> None:
    """The worker's side: prepare, say so, answer requests until the input ends.

    What libraries print goes to stderr: standard output carries answers only.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    handle = prepare()
    say({"ready": True})
    for line in sys.stdin:
        say(handle(json.loads(line)))


@contextmanager
def workers(commands: Mapping[str, Sequence[str]], threads: int) -> Iterator[dict[str, Worker]]:
    """Start a worker for each command; all have loaded when the block begins."""
    with ExitStack() as stack:
        started = {}
        for name, command in commands.items():
            started[name] = Worker(command, threads)
            stack.callback(started[name].close)
        yield started


def interleave(rivals: Mapping[str, Worker], request: dict, rounds: int) -> dict[str, list[dict]]:
    """Ask every worker the same in turn, ``rounds`` times after one round that warms up and is not kept."""
    answers: dict[str, list[dict]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, worker in rivals.items():
            time.sleep(SETTLE_SEC)
            answer = worker.ask(request)
            if number:
                answers[name].append(answer)
    return answers
