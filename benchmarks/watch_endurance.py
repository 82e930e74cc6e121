"""Ten minutes of ``watch`` on a camera of 30 frames a second: memory, age of the answers, and every drop counted.

    python -m benchmarks.watch_endurance                   # vz-demo at 4 bits and 320 tokens, on the CPU

The source is synthetic: a 640 x 480 picture with a square that moves, a fresh array for each frame, each at its time
on a fixed schedule, as a camera gives them. Two questions are asked about the newest frame, again and again. Once a
second, just after a result, the process reads its resident memory (``VmRSS``). The first tenth of the time, a minute
of ten, is for memory to settle: what it is compared with is the median of that tenth's last third.

A result is as old as its frame: from the moment at which the source gave it to the moment at which the answers were
there. If the newest frame was taken, that is at most the inference and one frame interval. Intervals are as long as
the source and the scheduler made them, not always a thirtieth of a second: the report has both.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import bundles
from benchmarks.report import REPORTS, Bar, Cell, Report, Samples
from vz_edge import EdgeModel
from vz_edge.profiling.environment import busy_percent
from vz_edge.profiling.process_memory import memory_bytes
from vz_edge.watch import Result

FRAMES_PER_SEC = 30
SIZE = (480, 640)  # height, width
SQUARE = 80
QUESTIONS = [
    ("What shape is in the picture?", {"max_new_tokens": 8}),
    ("Is there a red square?", {"max_new_tokens": 8}),
]
MINUTES = 10.0
GROWTH_LIMIT_PERCENT = 2
MB, MS = 1e6, 1e3


class Camera:
    """A red square that moves over grey, 30 times a second.

    ``given`` frames were read, with at most ``longest_interval_sec`` from one to the next.
    """

    def __init__(self) -> None:
        self.given = 0
        self.longest_interval_sec = 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        started = before = time.monotonic()
        for number in itertools.count():
            time.sleep(max(0.0, started + number / FRAMES_PER_SEC - time.monotonic()))
            frame = np.full((*SIZE, 3), 128, np.uint8)
            place = number * 4 % (SIZE[1] - SQUARE)
            frame[200 : 200 + SQUARE, place : place + SQUARE] = (200, 20, 20)
            now = time.monotonic()
            yield frame
            # Who comes back for the next one has put this one where it can be taken: between ``before`` and now.
            self.longest_interval_sec = max(self.longest_interval_sec, time.monotonic() - before)
            self.given, before = self.given + 1, now


@dataclass
class Second:
    """The worst of what came in one second, and the resident memory at its end."""

    resident_bytes: int = 0
    latency_sec: float = 0.0
    age_sec: float = 0.0
    inference_sec: float = 0.0

    def take_in(self, result: Result) -> None:
        self.latency_sec = max(self.latency_sec, result.latency_sec)
        self.age_sec = max(self.age_sec, result.age_sec)
        self.inference_sec = max(self.inference_sec, result.timings.total_sec)


@dataclass
class Course:
    """What happened; ``miscounted`` results gave another number of drops than their frames' numbers have gaps."""

    seconds: list[Second] = field(default_factory=list)
    results: int = 0
    miscounted: int = 0
    wrong: int = 0  # results with an error or without all replies
    last_frame: int = -1


def watch(model: EdgeModel, camera: Camera, minutes: float) -> tuple[Course, dict[str, float]]:
    """Watch the camera; returns what happened and what was counted."""
    started = time.monotonic()
    course, second, ends = Course(), Second(), started + 1
    with model.watch(camera, QUESTIONS) as results:
        for result in results:
            second.take_in(result)
            course.results += 1
            course.miscounted += result.dropped != int(result.frame_id) - course.last_frame - 1
            course.wrong += result.error is not None or None in result.replies
            course.last_frame = int(result.frame_id)
            if time.monotonic() >= ends:
                second.resident_bytes = memory_bytes()["VmRSS"]
                course.seconds.append(second)
                second, ends = Second(), time.monotonic() + 1
            if time.monotonic() >= started + 60 * minutes:
                break
    return course, results.metrics.as_dict()


def growth_percent(resident: list[int], settle: int) -> float:
    """How far the highest reading after the first ``settle`` lies above the median of those ones' last third."""
    settled = float(np.median(resident[settle - settle // 3 - 1 : settle]))
    return 100 * (max(resident[settle:]) / settled - 1)


def report(course: Course, counted: dict[str, float], camera: Camera, minutes: float, busy: float) -> Report:
    """Tabulate, and hold against the bars."""
    read, taken, dropped = (int(counted[f"vz_edge_watch_frames_{name}_total"]) for name in ("read", "taken", "dropped"))
    unaccounted = abs(camera.given - read) + abs(read - taken - dropped) + abs(taken - course.results)
    resident = [second.resident_bytes for second in course.seconds]
    settle = max(1, len(resident) // 10)
    if len(resident) <= settle:
        raise SystemExit("fewer than two seconds had a result; watch for longer, or on an idle machine")
    interval_sec = 1 / FRAMES_PER_SEC
    measured = {
        "resident memory, once a second": Samples(tuple(value / MB for value in resident), "MB"),
        "age of a frame when it was taken, worst of each second": _milliseconds(course, "age_sec"),
        "inference: a picture and two questions, worst of each second": _milliseconds(course, "inference_sec"),
        "latency, from frame to answers, worst of each second": _milliseconds(course, "latency_sec"),
        "longest time between two frames": Samples((camera.longest_interval_sec * MS,), "ms"),
        "frames read": Samples((camera.given,), ""),
        "frames answered": Samples((taken,), ""),
        "frames dropped": Samples((dropped,), ""),
    }
    rows: list[dict[str, Cell]] = [{"quantity": name, "measured": samples} for name, samples in measured.items()]
    worst_age_sec = max(second.age_sec for second in course.seconds)
    worst_latency_sec = max(second.latency_sec for second in course.seconds)
    slowest_sec = max(second.inference_sec for second in course.seconds)
    return Report(
        name="watch_endurance",
        title=f"watch: {minutes:g} minutes of {FRAMES_PER_SEC} frames a second with vz-demo",
        busy_percent=busy,
        notes=[
            "4 bits, 320 tokens, on the CPU. Memory-mapped files count as resident memory; 1 MB is 1e6 bytes.",
            f"Memory settles in the first {settle} readings of {len(resident)}.",
            f"{course.wrong} results had an error or lacked a reply.",
        ],
        rows=rows,
        bars=[
            Bar("growth of resident memory", growth_percent(resident, settle), "<=", GROWTH_LIMIT_PERCENT, "%"),
            Bar("latency", worst_latency_sec * MS, "<=", (slowest_sec + interval_sec) * MS, "ms"),
            Bar("age when taken", worst_age_sec * MS, "<=", camera.longest_interval_sec * MS, "ms"),
            Bar("frames not accounted for", unaccounted, "<=", 0, "frames"),
            Bar("results that miscounted", course.miscounted, "<=", 0, "results"),
        ],
    )


def _milliseconds(course: Course, name: str) -> Samples:
    return Samples(tuple(getattr(second, name) * MS for second in course.seconds), "ms")


def main() -> None:
    """Export, watch, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--threads", type=int, default=None, help="the physical cores by default")
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--reports", type=Path, default=REPORTS)
    arguments = parser.parse_args()
    bundle = bundles.demo_bundle(arguments.work)
    busy = busy_percent()
    camera = Camera()
    course, counted = watch(EdgeModel.load(bundle, threads=arguments.threads), camera, arguments.minutes)
    report(course, counted, camera, arguments.minutes, busy).write(arguments.reports)


if __name__ == "__main__":
    main()
