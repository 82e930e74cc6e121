"""What a watch counts and how long things took, for ``Watch.metrics``."""

from __future__ import annotations

import dataclasses

from vz_edge.metrics import Metrics
from vz_edge.watch.reader import Counters
from vz_edge.watch.result import Result, Timings

PREFIX = "vz_edge_watch"


class WatchMetrics:
    """The counters and summaries of a watch, in ``metrics``."""

    def __init__(self, metrics: Metrics) -> None:
        self.frames = Counters(
            read=metrics.counter(f"{PREFIX}_frames_read_total", "Frames that the source gave."),
            taken=metrics.counter(f"{PREFIX}_frames_taken_total", "Frames that were taken to be answered."),
            dropped=metrics.counter(f"{PREFIX}_frames_dropped_total", "Frames that were passed over."),
        )
        self._unchanged = metrics.counter(
            f"{PREFIX}_frames_unchanged_total", "Frames taken that the gate found unchanged."
        )
        self._errors = metrics.counter(f"{PREFIX}_frame_errors_total", "Frames taken that ended with an error.")
        self._missed = metrics.counter(f"{PREFIX}_deadline_missed_total", "Frames taken that missed their deadline.")
        self._age = metrics.summary(f"{PREFIX}_age_seconds", "From reading a frame to taking it.")
        self._latency = metrics.summary(f"{PREFIX}_latency_seconds", "From reading a frame to its result.")
        self._timings = {
            field.name: metrics.summary(
                f"{PREFIX}_{field.name.removesuffix('_sec')}_seconds", "As in the timings of a result."
            )
            for field in dataclasses.fields(Timings)
        }

    def observe(self, result: Result) -> None:
        """Take in a result."""
        self._unchanged.add(not result.changed)
        self._errors.add(result.error is not None)
        self._missed.add(result.deadline_missed)
        self._age.observe(result.age_sec)
        self._latency.observe(result.latency_sec)
        for name, summary in self._timings.items():
            summary.observe(getattr(result.timings, name))
