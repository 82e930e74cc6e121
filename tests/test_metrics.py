"""The text is what Prometheus's own parser reads, and says the same as the dict."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from vz_edge.metrics import Metrics

VALUES = st.floats(0, 1e12) | st.integers(0, 10**12)
# A surrogate alone is no text.
LABELS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def parsed(text: str) -> dict[str, tuple[str, dict]]:
    """Family by name: its type, and the samples by name and labels."""
    return {
        family.name: (family.type, {(s.name, *sorted(s.labels.items())): s.value for s in family.samples})
        for family in text_string_to_metric_families(text)
    }


def test_a_golden_text() -> None:
    metrics = Metrics()
    metrics.counter("frames_total", "Frames that came.").add(3)
    waited = metrics.summary("wait_seconds", "Time spent waiting.")
    waited.observe(0.25, camera="left")
    waited.observe(0.5, camera="left")
    assert metrics.text() == (
        "# HELP frames_total Frames that came.\n# TYPE frames_total counter\nframes_total 3\n"
        "# HELP wait_seconds Time spent waiting.\n# TYPE wait_seconds summary\n"
        'wait_seconds_sum{camera="left"} 0.75\nwait_seconds_count{camera="left"} 2\n'
    )
    assert metrics.as_dict() == {
        "frames_total": 3.0,
        'wait_seconds_sum{camera="left"}': 0.75,
        'wait_seconds_count{camera="left"}': 2.0,
    }


def test_a_gauge_is_read_when_it_is_asked_for() -> None:
    metrics, kept = Metrics(), [5]
    metrics.gauge("kept_bytes", "What is kept.", lambda: kept[0])
    assert parsed(metrics.text())["kept_bytes"] == ("gauge", {("kept_bytes",): 5})
    kept[0] = 7
    assert metrics.as_dict() == {"kept_bytes": 7.0}
    metrics.gauge("kept_bytes", "Anew.", lambda: 1)
    assert metrics.as_dict() == {"kept_bytes": 1.0}
    with pytest.raises(ValueError, match="is a gauge, not a counter"):
        metrics.counter("kept_bytes", "Counted.")
    metrics.summary("wait_seconds", "Waited.")
    with pytest.raises(ValueError, match="is a summary, not a gauge"):
        metrics.gauge("wait_seconds", "Waited.", lambda: 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(LABELS, VALUES), max_size=5), st.lists(VALUES, max_size=5))
def test_the_parser_reads_what_was_counted(counts: list[tuple[str, float]], values: list[float]) -> None:
    metrics = Metrics()
    counter, summary = metrics.counter("a_total", "Counted."), metrics.summary("b_seconds", "Seen.")
    for label, amount in counts:
        counter.add(amount, path=label, status="200")
    for value in values:
        summary.observe(value)
    families = parsed(metrics.text())
    expected: dict = {}
    for label, amount in counts:
        key = ("a_total", ("path", label), ("status", "200"))
        expected[key] = expected.get(key, 0) + amount
        assert counter.value(status="200", path=label) >= amount
    assert families["a"] == ("counter", pytest.approx(expected or {("a_total",): 0}, rel=1e-12))
    assert families["b_seconds"] == (
        "summary",
        pytest.approx({("b_seconds_sum",): sum(values), ("b_seconds_count",): len(values)}, rel=1e-12),
    )


def test_no_count_is_lost_between_threads() -> None:
    counter = Metrics().counter("a_total", "Counted.")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: [counter.add() for _ in range(1000)], range(4)))
    assert counter.value() == 4000


def test_a_name_is_one_thing_and_a_counter_only_grows() -> None:
    metrics = Metrics()
    assert metrics.counter("a_total", "Counted.") is metrics.counter("a_total", "Counted.")
    with pytest.raises(ValueError, match="a_total is a counter"):
        metrics.summary("a_total", "Counted.")
    metrics.summary("b_seconds", "Seen.")
    with pytest.raises(ValueError, match="b_seconds is a summary"):
        metrics.counter("b_seconds", "Seen.")
    with pytest.raises(ValueError, match="only grows"):
        metrics.counter("a_total", "Counted.").add(-1)
