"""The second turn of a conversation over HTTP beside the first: a decoder of 1B, 320 tokens a picture, on the CPU.

    python -m benchmarks.serve_cache

A client sends a picture with a question to ``vz-edge serve``, and then, as HTTP clients do, the whole conversation with
the next question. What is measured is the time from the request to the first event of the streamed answer, which comes
with its first text: base64, JPEG, JSON and loopback are in it. The same is asked of a server that keeps nothing
(``--cache-bytes 0``). Random weights; vision tower CLIP ViT-L/14-336, five tiles, a picture of its own in each round.

A checkpoint and a bundle that were not there are removed at the end.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import bundles
from benchmarks.report import REPORTS, Bar, Cell, Report, Samples
from benchmarks.server import CHAT, TIMEOUT_SEC, Server
from vz_edge.bundle import read_manifest
from vz_edge.profiling.environment import busy_percent

QUESTIONS = ("What is on the table?", "And what is beside it?")
PICTURE_SIZE = (800, 1000, 3)  # height, width, channels
ANSWER_TOKENS = 8
LEAST_SPEED_UP = 8.0
WAYS = {"kept": (), "nothing kept": ("--cache-bytes", "0")}


@dataclass(frozen=True)
class Turn:
    """An answer's first event in seconds after the request; its text, and tokens of its prompt."""

    first_sec: float
    text: str
    prompt_tokens: int
    cached_tokens: int


def picture_url(seed: int) -> str:
    """A picture like no other, as a JPEG in a data URL."""
    pixels = np.random.default_rng(seed).integers(0, 256, PICTURE_SIZE, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(connection: http.client.HTTPConnection, model: str, messages: list[dict[str, Any]]) -> Turn:
    """Ask for a streamed answer and read it to its end."""
    body = {"model": model, "messages": messages, "max_tokens": ANSWER_TOKENS, "stream": True}
    encoded = json.dumps({**body, "stream_options": {"include_usage": True}})
    started = time.perf_counter()
    connection.request("POST", CHAT, encoded, {"Content-Type": "application/json"})
    response = connection.getresponse()
    first = response.readline()
    first_sec = time.perf_counter() - started
    *events, done, _ = (first + response.read()).decode().split("\n\n")
    if response.status != 200 or done != "data: [DONE]":
        raise SystemExit(f"the server answered with status {response.status}: {first[:300]!r}")
    chunks = [json.loads(event[6:]) for event in events]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    usage = chunks[-1]["usage"]
    return Turn(first_sec, text, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])


def two_turns(port: int, model: str, url: str) -> tuple[Turn, Turn]:
    """A conversation about a picture."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SEC)) as connection:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTIONS[0]}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        first = ask(connection, model, messages)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": QUESTIONS[1]}]
        return first, ask(connection, model, messages)


def measure(bundle: Path, work: Path, threads: int, rounds: int) -> dict[str, list[tuple[Turn, Turn]]]:
    """Both turns of each round, the servers in turn; the first round warms up."""
    model = read_manifest(bundle).name
    taken: dict[str, list[tuple[Turn, Turn]]] = {way: [] for way in WAYS}
    for way, options in WAYS.items():
        server = Server(bundle, work / "serve_cache.log", "-q", "--threads", str(threads), *options)
        try:
            taken[way] = [two_turns(server.port, model, picture_url(seed)) for seed in range(rounds + 1)][1:]
            server.stop()
        finally:
            server.process.kill()
    return taken


def report(shape: str, taken: dict[str, list[tuple[Turn, Turn]]], busy: float) -> Report:
    """Tabulate; the speed-up is the median of the rounds' own ratios."""
    speed_ups = [first.first_sec / second.first_sec for first, second in taken["kept"]]
    rows: list[dict[str, Cell]] = [
        {
            "server": way,
            "turn": str(number + 1),
            "first text": Samples(tuple(turns[number].first_sec for turns in rounds), "s"),
            "prompt tokens": str(rounds[0][number].prompt_tokens),
            "of them cached": str(rounds[0][number].cached_tokens),
        }
        for way, rounds in taken.items()
        for number in range(2)
    ]
    same = sum(
        kept[0].text == anew[0].text and (kept[1].text == anew[1].text)
        for kept, anew in zip(*taken.values(), strict=True)
    )
    return Report(
        name="serve_cache",
        title=f"vz-edge serve: the second turn about a picture beside the first, a {shape} on the CPU",
        busy_percent=busy,
        notes=[
            f"Greedy, random weights, answers of {ANSWER_TOKENS} tokens; {len(speed_ups)} rounds after one that warms "
            "up, each with a JPEG of 1000 x 800 pixels of its own.",
            "First text: from the request to the first event of the streamed answer, over loopback.",
            f"{same} of {len(speed_ups)} conversations had the same texts from both servers. A prompt that is read in "
            "two parts sums in another order, and random weights have close calls.",
        ],
        rows=rows,
        bars=[Bar("first turn / second turn", statistics.median(speed_ups), ">=", LEAST_SPEED_UP, "x")]
        if shape == "1b"
        else (),
        settings={"rounds": len(speed_ups), "speed_ups": str(speed_ups)},
    )


@contextlib.contextmanager
def lent_bundle(shape: str, work: Path) -> Iterator[Path]:
    """The bundle of that shape; it and its checkpoint are removed afterwards unless they were there before."""
    made = [folder for folder in (work / shape, bundles.bundle_folder(shape, "cpu", work)) if not folder.exists()]
    try:
        yield bundles.bundle(shape, "cpu", work)
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", help="1b or tiny")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--reports", type=Path, default=REPORTS)
    arguments = parser.parse_args()
    busy = busy_percent()
    with lent_bundle(arguments.shape, arguments.work) as bundle:
        taken = measure(bundle, arguments.work, arguments.threads, arguments.rounds)
    report(arguments.shape, taken, busy).write(arguments.reports)


if __name__ == "__main__":
    main()
