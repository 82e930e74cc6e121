"""Counts and sums of a running program, as a dict and as Prometheus text.

>>> metrics = Metrics()
>>> dropped = metrics.counter("vz_edge_watch_frames_dropped_total", "Frames that a newer one replaced.")
>>> dropped.add(3)
>>> metrics.as_dict()
{'vz_edge_watch_frames_dropped_total': 3.0}
>>> print(metrics.text(), end="")
# HELP vz_edge_watch_frames_dropped_total Frames that a newer one replaced.
# TYPE vz_edge_watch_frames_dropped_total counter
vz_edge_watch_frames_dropped_total 3

The text is Prometheus's exposition format 0.0.4
(https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format); serve it as ``CONTENT_TYPE``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number that only grows, one for each set of labels. Made by ``Metrics.counter``; safe in several threads."""

    kind: Literal["counter"] = "counter"

    def __init__(self, name: str, about: str) -> None:
        self.name = name
        self.about = about
        self._values: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def add(self, amount: float = 1, **labels: str) -> None:
        """Count ``amount``, 0 or more, in the series of ``labels``."""
        if amount < 0:
            raise ValueError(f"{self.name} cannot shrink by {-amount}; a counter only grows")
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def value(self, **labels: str) -> float:
        """What was counted in the series of ``labels``."""
        with self._lock:
            return self._values.get(tuple(sorted(labels.items())), 0)

    def samples(self) -> Iterator[tuple[str, float]]:
        """Name, with its labels, and value of each series."""
        with self._lock:
            values = list(self._values.items())
        for labels, value in values or [((), 0)]:
            yield self.name + _braces(labels), value


class Summary:
    """How many values were seen and their sum, for each set of labels; their ratio is the mean."""

    kind: Literal["summary"] = "summary"

    def __init__(self, name: str, about: str) -> None:
        self.name = name
        self.about = about
        self._values: dict[Labels, tuple[float, int]] = {}
        self._lock = threading.Lock()

    def observe(self, value: float, **labels: str) -> None:
        """Take in one value."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            total, count = self._values.get(key, (0.0, 0))
            self._values[key] = total + value, count + 1

    def samples(self) -> Iterator[tuple[str, float]]:
        """Name, with its labels, and value of sum and count of each series."""
        with self._lock:
            values = list(self._values.items())
        for labels, (total, count) in values or [((), (0.0, 0))]:
            yield f"{self.name}_sum{_braces(labels)}", total
            yield f"{self.name}_count{_braces(labels)}", count


class Gauge:
    """A number as it is when it is asked for. Made by ``Metrics.gauge``; ``read`` must be safe in several threads."""

    kind: Literal["gauge"] = "gauge"

    def __init__(self, name: str, about: str, read: Callable[[], float]) -> None:
        self.name = name
        self.about = about
        self._read = read

    def samples(self) -> Iterator[tuple[str, float]]:
        """Name and value."""
        yield self.name, self._read()


class Metrics:
    """A set of counters, summaries and gauges. A name that was asked for before gives the same one again."""

    def __init__(self) -> None:
        self._all: dict[str, Counter | Summary | Gauge] = {}
        self._lock = threading.Lock()

    def counter(self, name: str, about: str) -> Counter:
        """The counter ``name``, which by Prometheus's custom ends with ``_total``."""
        with self._lock:
            found = self._all.setdefault(name, Counter(name, about))
        if not isinstance(found, Counter):
            raise ValueError(f"{name} is a {found.kind}, not a counter; give the counter another name")
        return found

    def summary(self, name: str, about: str) -> Summary:
        """The summary ``name``, which ends with its unit, as ``_seconds``."""
        with self._lock:
            found = self._all.setdefault(name, Summary(name, about))
        if not isinstance(found, Summary):
            raise ValueError(f"{name} is a {found.kind}, not a summary; give the summary another name")
        return found

    def gauge(self, name: str, about: str, read: Callable[[], float]) -> Gauge:
        """The gauge ``name``, which is what ``read`` returns; a gauge of that name is replaced."""
        with self._lock:
            found = self._all.get(name)
            if found is not None and not isinstance(found, Gauge):
                raise ValueError(f"{name} is a {found.kind}, not a gauge; give the gauge another name")
            self._all[name] = gauge = Gauge(name, about, read)
        return gauge

    def as_dict(self) -> dict[str, float]:
        """Every sample of ``text``, by its name with its labels."""
        return {name: float(value) for metric in self._listed() for name, value in metric.samples()}

    def text(self) -> str:
        """All of it in Prometheus's text format."""
        lines = []
        for metric in self._listed():
            lines += [f"# HELP {metric.name} {metric.about}", f"# TYPE {metric.name} {metric.kind}"]
            lines += [f"{name} {value:.15g}" for name, value in metric.samples()]
        return "".join(f"{line}\n" for line in lines)

    def _listed(self) -> list[Counter | Summary | Gauge]:
        with self._lock:
            return list(self._all.values())


def _braces(labels: Labels) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
