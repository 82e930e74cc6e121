"""``vz-edge serve`` under load: 16 clients at once, each with its own pictures, then requests that are wrong.

    python -m benchmarks.serve_load

Exports ``vz-demo`` at 4 bits and 320 tokens, asks it directly about pictures of easy-VQA's test part, and starts a
server with a place for each client. Then, over loopback:

* load: every client asks about its own pictures without a pause, every other answer streamed; each answer is compared
  with the direct one. There is a place for everyone, so nobody may be told that the queue is full
* bursts: three times as many clients at once; whoever finds no place must be told so (429), all others answered
* broken connections: clients that hang up while they wait or are answered; their places must become free
* malformed requests (``malformed.py``): never a status of 500 or more

The server's resident memory is read every second. Flat means: the median of the last third of the load is that of its
second third. At the end SIGTERM has to end the server with status 0.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import bundles
from benchmarks.malformed import malformed_requests
from benchmarks.report import REPORTS, Bar, Report, Samples
from benchmarks.server import CHAT, TIMEOUT_SEC, Server
from training.scenes import easy_vqa_test
from vz_edge import EdgeModel
from vz_edge.profiling.environment import busy_percent
from vz_edge.profiling.process_memory import memory_bytes

CLIENTS, PICTURES_EACH = 16, 4
BURSTS, BURST_CLIENTS = 3, 3 * CLIENTS
BROKEN = 32
MALFORMED, SEED = 2000, 20_000
ANSWER_TOKENS = 8
CACHE_BYTES = 64 * 2**20  # fewer conversations than there are cases: most are let go before they come again
CLOSED_SEC = 10.0  # a server has this long to hang up on who sends no more
MOST_GROWTH_PERCENT = 5.0
MB = 1e6


@dataclass(frozen=True)
class Case:
    """A request, and the text that a direct ask gave for it."""

    body: dict[str, Any]
    expected: str


@dataclass
class Outcome:
    """What a phase's requests came to. ``statuses`` counts None where there was no answer at all."""

    name: str
    statuses: Counter[int | None] = field(default_factory=Counter)
    wrong: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """Requests with an answer."""
        return self.statuses[200]

    @property
    def others(self) -> int:
        """Requests that were neither answered nor told that the queue is full."""
        return sum(count for status, count in self.statuses.items() if status not in (200, 429))

    @property
    def server_errors(self) -> int:
        """Statuses of 500 or more."""
        return sum(count for status, count in self.statuses.items() if status is not None and status >= 500)


def make_cases(bundle: Path) -> list[Case]:
    """Pictures of easy-VQA, one question each, and what the model answers when it is asked directly."""
    model = EdgeModel.load(bundle)
    cases = []
    for path, pairs in easy_vqa_test()[: CLIENTS * PICTURES_EACH]:
        question = pairs[len(cases) % len(pairs)][0]
        expected = model.ask(path, question, max_new_tokens=ANSWER_TOKENS).text
        url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        cases.append(Case({"model": "vz-demo", "messages": [message], "max_tokens": ANSWER_TOKENS}, expected))
    return cases


def ask(connection: http.client.HTTPConnection, case: Case, stream: bool, outcome: Outcome) -> None:
    """One request on a connection that is kept; what it came to is added to ``outcome``."""
    started = time.perf_counter()
    try:
        body = json.dumps({**case.body, "stream": stream})
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        status, text = response.status, response.read().decode()
    except (OSError, http.client.HTTPException):
        connection.close()
        status, text = None, ""
    outcome.statuses[status] += 1
    if status == 200:
        outcome.seconds.append(time.perf_counter() - started)
        outcome.wrong += answer_of(text, stream) != case.expected


def answer_of(text: str, stream: bool) -> str | None:
    """The answer in a response's body; None where it broke off."""
    if not stream:
        return json.loads(text)["choices"][0]["message"]["content"]
    *events, done, _ = text.split("\n\n")
    if done != "data: [DONE]":
        return None
    return "".join(json.loads(event[6:])["choices"][0]["delta"].get("content", "") for event in events)


def run_load(port: int, cases: Sequence[Case], minutes: float) -> Outcome:
    """Every client asks about its own pictures in turn until time is up."""
    until = time.monotonic() + 60 * minutes

    def client(number: int) -> Outcome:
        own, outcome = cases[number * PICTURES_EACH :][:PICTURES_EACH], Outcome("load")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SEC)) as connection:
            turn = 0
            while time.monotonic() < until:
                ask(connection, own[turn % len(own)], bool((turn + number) % 2), outcome)
                turn += 1
        return outcome

    return _together("load", client, CLIENTS)


def run_burst(port: int, cases: Sequence[Case]) -> Outcome:
    """More clients at once than there are places."""

    def client(number: int) -> Outcome:
        outcome = Outcome("bursts")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SEC)) as connection:
            ask(connection, cases[number % len(cases)], bool(number % 2), outcome)
        return outcome

    return _together("bursts", client, BURST_CLIENTS)


def _together(name: str, client: Any, count: int) -> Outcome:
    whole = Outcome(name)
    with ThreadPoolExecutor(count) as pool:
        for part in pool.map(client, range(count)):
            whole.statuses += part.statuses
            whole.wrong += part.wrong
            whole.seconds += part.seconds
    return whole


def break_connections(port: int, cases: Sequence[Case]) -> None:
    """Ask and hang up without an answer, some clients at once, some later."""

    def client(number: int) -> None:
        body = json.dumps({**cases[number % len(cases)].body, "stream": bool(number % 2)}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_SEC) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.05 * (number % 8))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(BROKEN)))


def run_malformed(port: int, body: dict[str, Any], count: int) -> Outcome:
    """Send wrong requests, each on a connection of its own."""
    outcome = Outcome("malformed")
    for request in malformed_requests(count, SEED, body):
        outcome.statuses[send_raw(port, request.raw, request.is_cut_off)] += 1
    return outcome


def send_raw(port: int, raw: bytes, is_cut_off: bool) -> int | None:
    """The status that comes back for ``raw``; None where the server hangs up without one, as it may."""
    with socket.create_connection(("127.0.0.1", port), timeout=CLOSED_SEC if is_cut_off else TIMEOUT_SEC) as connection:
        answer = b""
        try:
            connection.sendall(raw)
            if is_cut_off:
                connection.shutdown(socket.SHUT_WR)
            while len(answer) < len(b"HTTP/1.1 200") and (more := connection.recv(4096)):
                answer += more
        except TimeoutError as error:
            raise SystemExit(f"the server neither answered nor hung up on {raw[:200]!r}") from error
        except OSError:  # it hung up while the request was on its way
            pass
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.") else None


@contextlib.contextmanager
def sampled_memory(pid: int, samples: list[int]) -> Iterator[None]:
    """Resident bytes of a process every second while the block runs."""
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(1.0):
            samples.append(memory_bytes(pid).get("VmRSS", 0))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def growth_percent(samples: Sequence[int]) -> float:
    """How much the median of the last third is over that of the second; the first third warms up."""
    third = len(samples) // 3
    return 100 * (statistics.median(samples[2 * third :]) / statistics.median(samples[third : 2 * third]) - 1)


def free_places(server: Server) -> bool:
    """Whether all who had a place gave it back, within a while."""
    for _ in range(100):
        counted = server.metrics()
        if counted["vz_edge_serve_admitted_total"] == counted["vz_edge_serve_finished_total"]:
            return True
        time.sleep(0.1)
    return False


def measure(bundle: Path, minutes: float, malformed: int, work: Path, busy: float) -> Report:
    """All phases against one server."""
    cases = make_cases(bundle)
    # A place for everyone: one more than may wait is being answered.
    options = ("--queue-length", str(CLIENTS - 1), "--cache-bytes", str(CACHE_BYTES), "-q")
    server = Server(bundle, work / "serve_load.log", *options)
    try:
        memory: list[int] = []
        with sampled_memory(server.process.pid, memory):
            load = run_load(server.port, cases, minutes)
        bursts = [run_burst(server.port, cases) for _ in range(BURSTS)]
        break_connections(server.port, cases)
        all_free = free_places(server)
        wrong_requests = run_malformed(server.port, cases[0].body, malformed)
        after = Outcome("after all that")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
            for case in cases[:CLIENTS]:
                ask(connection, case, False, after)
        last_bytes = memory_bytes(server.process.pid).get("VmRSS", 0)
        all_free = all_free and free_places(server)
        tracebacks, status = server.tracebacks(), server.stop()
    finally:
        server.process.kill()
    burst = Outcome("bursts", sum((b.statuses for b in bursts), Counter()), sum(b.wrong for b in bursts))
    burst.seconds = [seconds for b in bursts for seconds in b.seconds]
    phases = [load, burst, wrong_requests, after]
    return Report(
        name="serve_load",
        title=f"vz-edge serve: {CLIENTS} clients at once for {minutes:g} minutes, then {malformed} malformed requests",
        busy_percent=busy,
        notes=[
            "vz-demo, 4 bits, 320 tokens; easy-VQA pictures, one question each; clients and server share the cores.",
            f"A place for each of the {CLIENTS} clients; bursts are of {BURST_CLIENTS}. Every other answer streams.",
            "Wrong: another text than EdgeModel.ask gave for that picture before.",
            f"The server keeps {CACHE_BYTES / MB:.0f} MB of earlier requests, fewer than there are cases.",
            f"{BROKEN} connections were broken off between bursts and malformed requests.",
            f"Resident memory under load: {memory[0] / MB:.0f} MB at first, {statistics.median(memory) / MB:.0f} MB in "
            f"the median, {max(memory) / MB:.0f} MB at most; {last_bytes / MB:.0f} MB at the end of all.",
            "Malformed, by status (None: hung up without an answer): "
            + ", ".join(f"{key} {count}" for key, count in sorted(wrong_requests.statuses.items(), key=str)),
        ],
        rows=[
            {
                "phase": phase.name,
                "requests": str(phase.statuses.total()),
                "answered": str(phase.answered),
                "queue full (429)": str(phase.statuses[429]),
                "other": str(phase.others),
                "wrong answers": "–" if phase is wrong_requests else str(phase.wrong),
                "seconds an answer": Samples(tuple(phase.seconds), "s") if phase.seconds else "–",
            }
            for phase in phases
        ],
        bars=[
            Bar("load: answers", load.answered, ">=", CLIENTS, "requests"),
            Bar("load: neither answered nor 429", load.others, "<=", 0, "requests"),
            Bar("load: 429 although everyone has a place", load.statuses[429], "<=", 0, "requests"),
            Bar("wrong or mixed answers", load.wrong + burst.wrong + after.wrong, "<=", 0, "answers"),
            Bar("bursts: neither answered nor 429", burst.others, "<=", 0, "requests"),
            Bar("bursts: 429 where the queue is full", burst.statuses[429], ">=", 1, "requests"),
            Bar("growth of resident memory under load", growth_percent(memory), "<=", MOST_GROWTH_PERCENT, "%"),
            Bar("malformed: status of 500 or more", wrong_requests.server_errors, "<=", 0, "requests"),
            Bar("answers after all that", after.answered, ">=", CLIENTS, "requests"),
            Bar("all places free at the end", all_free, ">=", 1, ""),
            Bar("unexpected errors in the log", tracebacks, "<=", 0, "errors"),
            Bar("exit status after SIGTERM, or its signal", abs(status), "<=", 0, ""),
        ],
        settings={"minutes": minutes, "malformed": malformed, "rss_bytes": str(memory)},
    )


def main() -> None:
    """Export, load, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="of load")
    parser.add_argument("--malformed", type=int, default=MALFORMED, help="malformed requests")
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--reports", type=Path, default=REPORTS)
    arguments = parser.parse_args()
    busy = busy_percent()
    bundle = bundles.demo_bundle(arguments.work)
    measure(bundle, arguments.minutes, arguments.malformed, arguments.work, busy).write(arguments.reports)


if __name__ == "__main__":
    main()
