"""A process in which a grammar is tried before the model's own process compiles it.

Compiling a schema is native code over a stranger's text. Some schemas overflow its stack, some take gigabytes, some
take hours; none of these is an error that could be caught. A compiled grammar cannot be sent to another process, so
there are two ways: the whole matcher lives in the child, or the child is a trial. It is a trial: the child compiles the
same text over the same tokens, takes the first steps of an answer, and says how it went; only then the parent compiles
it, at the same cost, which is known to be small by now. The other way would need a message per token, and where one
grammar ended the child, all answers that are being written would end with it. Behind the first steps llguidance's own
bounds hold: each step has a budget of work and of states, and one that needs more is an AnswerError.

The child's stack is smaller than a thread's of the parent, so what passes here does not overflow there. It is started
with the first grammar, kept for the next ones, and started anew where one ended it.

A line of JSON goes each way. First ``{"tokenizer": ..., "size": ..., "stop_ids": ...}`` -> ``{}``, then for each
grammar ``{"source": ...}`` -> ``{"heavy": ...}`` or ``{"error": ...}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from vz_edge.device.limited import limit_memory, limit_processor_time, resident_bytes
from vz_edge.device.matcher import new_matcher, token_table
from vz_edge.errors import DependencyError, RequestError, VzEdgeError

if TYPE_CHECKING:
    from llguidance import LLMatcher

START_SEC = 120.0  # a board under load may take a while to start Python
TRIAL_SEC = 5.0  # of processor time
LONGEST_WAIT_SEC = 30.0  # on a machine that has other work
SHORTEST_WAIT_SEC = 1.0  # a deadline that is all but over still admits an ordinary schema
TRIAL_BYTES = 256 * 2**20
STACK_BYTES = 2**20  # a thread of Python's has 8 MiB on Linux
HEAVY_BYTES = 8 * 2**20  # of a grammar that is not kept
STEPS = 8  # tokens of an answer that is tried


class GrammarTrial:
    """The child process of one model's tokens. May be shared between threads; one grammar is tried at a time."""

    def __init__(self, tokenizer_json: str, size: int, stop_ids: list[int]) -> None:
        self._hello = {"tokenizer": tokenizer_json, "size": size, "stop_ids": stop_ids}
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._finish: weakref.finalize[..., GrammarTrial] | None = None
        self._owner = 0

    def check(self, source: str, within_sec: float = LONGEST_WAIT_SEC) -> bool:
        """Whether the grammar of ``source`` is small enough to be kept.

        Raises RequestError unless it compiles within the bounds, and DependencyError without a child.
        """
        until = time.monotonic() + max(SHORTEST_WAIT_SEC, min(within_sec, LONGEST_WAIT_SEC))
        if not self._lock.acquire(timeout=until - time.monotonic()):
            raise RequestError("the schema's turn to be compiled did not come before the deadline; try again later")
        try:
            child = self._running()
            try:
                answer = self._exchange(child, {"source": source}, until - time.monotonic())
            except BaseException:  # as Ctrl-C: its answer must not become the next one's
                self._bury()
                raise
            if answer is None:
                raise RequestError(f"the schema cannot be compiled: {self._bury()}; simplify it")
            if answer.get("heavy"):  # what it leaves behind would hide what the next ones take
                self._bury()
        finally:
            self._lock.release()
        if "error" in answer:
            raise RequestError(answer["error"])
        return not answer["heavy"]

    def close(self) -> None:
        """End the child, and with it a trial that runs; the next grammar would start another one."""
        if self._child is not None and self._owner == os.getpid():
            self._child.kill()
        with self._lock:
            self._bury()

    def _running(self) -> subprocess.Popen[bytes]:
        """The child; a new one where there is none, or where this process is a fork and the child another's."""
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        self._bury()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
            "MALLOC_ARENA_MAX": "1",  # glibc reserves 64 MiB of addresses for each further one
        }
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", __name__],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is not for it
            )
        except OSError as error:
            raise DependencyError(
                f"a schema is tried in a process of its own, and none can be started ({error}); free what is short"
            ) from error
        self._child, self._owner = child, os.getpid()
        self._finish = weakref.finalize(self, _end, child, self._owner)
        if self._exchange(child, self._hello, START_SEC) is None:
            raise DependencyError(
                f"a schema is tried in a process of its own, which did not start ({self._bury()}); "
                f"see what '{sys.executable} -m {__name__}' says"
            )
        return child

    @staticmethod
    def _exchange(child: subprocess.Popen[bytes], message: dict[str, Any], within_sec: float) -> dict[str, Any] | None:
        """The child's answer; None where it ended, or was ended when the time was up."""
        assert child.stdin is not None and child.stdout is not None
        too_late = threading.Event()

        def end() -> None:
            too_late.set()
            child.kill()

        watch = threading.Timer(max(0.0, within_sec), end)
        watch.daemon = True
        watch.start()
        answer = None
        try:
            child.stdin.write(json.dumps(message).encode() + b"\n")
            child.stdin.flush()
            answer = dict(json.loads(child.stdout.readline()))
        except (OSError, ValueError):  # a broken pipe; no line, or half of one
            pass
        finally:
            watch.cancel()
            watch.join()
        return None if too_late.is_set() else answer

    def _bury(self) -> str:
        """End the child and say how it ended."""
        child, self._child = self._child, None
        if child is None or self._finish is None:
            return "it has ended"
        self._finish()
        return _how(child.returncode)


def _end(child: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():  # a fork of the process that started it
        return
    if child.poll() is None:
        try:
            child.wait(0.05)  # it may be just ending by itself, which says why
        except subprocess.TimeoutExpired:
            child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not read goes with it
                pipe.close()


def _how(status: int | None) -> str:
    name = ""
    if status is not None and status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
    if name in ("SIGPROF", "SIGKILL"):
        return f"that takes more than {TRIAL_SEC:g} s, or more time than the deadline leaves"
    if name in ("SIGSEGV", "SIGBUS"):
        return "it is nested too deeply"
    return f"that takes more than {TRIAL_BYTES >> 20} MiB of memory, or is more than llguidance can do"


def _walk(matcher: LLMatcher) -> None:
    """The first steps of an answer: what the grammar forces, else a token that it allows, far from the last one."""
    for step in range(STEPS):
        if matcher.is_stopped():
            return
        forced = matcher.compute_ff_tokens()
        if not forced:
            mask = matcher.compute_bitmask()
            start = step * len(mask) // STEPS
            places = (*range(start, len(mask)), *range(start))
            byte = next((place for place in places if mask[place]), None)
            if byte is None:
                return
            forced = [8 * byte + (mask[byte] & -mask[byte]).bit_length() - 1]
        if not matcher.consume_tokens(forced[:STEPS]):
            return


def _serve() -> None:
    """Answer the lines of stdin until it ends."""
    hello = json.loads(sys.stdin.buffer.readline())
    table = token_table(hello["tokenizer"], hello["size"], hello["stop_ids"])
    limit_memory(TRIAL_BYTES)
    at_first = resident_bytes()
    _say({})
    for line in sys.stdin.buffer:
        limit_processor_time(TRIAL_SEC)
        answer: dict[str, Any]
        try:
            _, matcher = new_matcher(table, json.loads(line)["source"])
            _walk(matcher)
            answer = {"heavy": resident_bytes() - at_first > HEAVY_BYTES}
            del matcher
        except VzEdgeError as error:
            answer = {"error": str(error)}
        limit_processor_time(0)
        _say(answer)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Serve in a thread whose stack is known; whatever else goes wrong in it ends the process."""
    threading.excepthook = lambda _: os._exit(1)
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
