"""Reports: what comes back from JSON, what is flagged, what counts as worse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vz_edge.bundle import default_weights
from vz_edge.errors import MeasurementError, RequestError
from vz_edge.profiling.baseline import check_comparable, parse_share, regressions
from vz_edge.profiling.environment import Environment
from vz_edge.profiling.run_page import page
from vz_edge.profiling.run_report import (
    STAGES,
    TIMES,
    BundleRun,
    Identity,
    Predicted,
    RunReport,
    Samples,
    Settings,
    disturbances,
    read_report,
    to_json,
)
from vz_edge.profiling.run_table import PEAK_LABEL, rows

MACHINE = Environment("a <fast> CPU", 8, 16.0, (), None, None, "Linux", {"python": "3.11"})
SETTINGS = Settings((672, 672), "what?", 64, 4)


def bundle_run(time_factor: float = 1.0, peak_gb: float = 2.0, values: tuple[float, ...] = (1.0, 1.02)) -> BundleRun:
    times = {
        name: Samples.of(value / time_factor if name.endswith("per_sec") else value * time_factor for value in values)
        for name in TIMES
    }
    memory = {stage: {"peak_rss_bytes": Samples.of([1e9]), "pss_bytes": Samples.of([5e8])} for stage in STAGES}
    memory["prefill"] = {"peak_rss_bytes": Samples.of([peak_gb * 1e9]), "pss_bytes": Samples.of([1e9])}
    identity = Identity("llava", "cpu", default_weights(4), None, ("CPUExecutionProvider",))
    return BundleRun("bundles/llava", identity, 5, 320, 30, 1.0, times, memory)


def report(*runs: BundleRun) -> RunReport:
    return RunReport(
        1, "vz-edge profile", "2026-01-01", MACHINE, SETTINGS, 2, 1.0, 5.0, 0.1, ("it was <busy>",), (), None, runs
    )


numbers = st.floats(1e-3, 1e6)


@given(st.lists(numbers, min_size=1, max_size=9))
def test_a_median_lies_within_and_the_spread_scales_away(values: list[float]) -> None:
    samples = Samples.of(values)
    assert min(values) <= samples.median <= max(values)
    assert Samples.of(4 * value for value in values).spread == pytest.approx(samples.spread)
    assert (samples.spread == 0) == (len(set(values)) == 1)


@given(st.lists(numbers, min_size=1, max_size=3), st.booleans(), st.none() | st.integers(0, 1 << 40))
def test_json_gives_the_report_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], predicted: bool, ram: int | None
) -> None:
    run = bundle_run(values=tuple(values))
    if predicted:
        run = dataclasses.replace(run, predicted=Predicted("agx-orin", {"ttft_sec": 1.5}, {"load": 1 << 31}, 3 << 30))
    written = dataclasses.replace(report(run), tegrastats_peak_bytes=ram)
    path = tmp_path_factory.getbasetemp() / "report.json"
    path.write_text(to_json(written), encoding="utf-8")
    assert read_report(path) == written


def test_what_is_no_report_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(MeasurementError, match="cannot be read"):
        read_report(path)
    data = json.loads(to_json(report(bundle_run())))
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "report format None"),
        (json.dumps(data | {"format_version": 2}), "report format 2, this version reads 1"),
        (json.dumps(data | {"bussy_percent": 2}), "bussy_percent: unknown key"),
        (json.dumps(data | {"runs": "two"}), "runs: expected int"),
    ):
        path.write_text(text)
        with pytest.raises(MeasurementError, match=message) as caught:
            read_report(path)
        assert "vz-edge profile --json" in str(caught.value) and "\n" not in str(caught.value)


def test_disturbances_are_named() -> None:
    assert disturbances([bundle_run()], 2, 5.0) == []
    busy, apart = disturbances([bundle_run(values=(1.0, 1.2))], 2, 40.0)
    assert "40%" in busy
    assert apart.startswith("bundles/llava: spread above the limit of 10%: load_sec 18%, preprocess_sec 18%")
    assert disturbances([bundle_run(values=(1.0,))], 1, 0.0) == ["one run: how far runs lie apart is not known"]


@given(st.floats(0.2, 5.0), st.floats(0.01, 0.5))
def test_worse_is_what_takes_longer_by_more_than_the_limit(factor: float, limit: float) -> None:
    found = regressions(report(bundle_run()), report(bundle_run(time_factor=factor)), limit)
    if factor > (1 + limit) * 1.001:
        assert len(found) == len(TIMES) - 1  # all but loading
        assert all(f"{factor - 1:.1%} worse" in line for line in found)
    elif factor < (1 + limit) * 0.999:
        assert found == []


def test_memory_is_compared_at_its_peak_and_doubt_is_said() -> None:
    (line,) = regressions(report(bundle_run()), report(bundle_run(peak_gb=2.5)), 0.1)
    assert line == "bundles/llava: peak_rss_bytes 2.000 -> 2.500 GB, 25.0% worse"
    found = regressions(report(bundle_run()), report(bundle_run(2.0, values=(1.0, 1.5))), 0.1)
    assert all("disturbed: runs lie 40% apart" in line for line in found)


def test_only_the_same_bundles_on_the_same_hardware_are_compared() -> None:
    earlier, path = report(bundle_run()), Path("report.json")
    identity = earlier.bundles[0].identity
    check_comparable(path, earlier, SETTINGS, dataclasses.replace(MACHINE, system="another kernel"), [identity])
    for settings, machine, identities, message in (
        (SETTINGS, MACHINE, [identity, identity], r"holds 1 bundle\(s\), 2 are to be measured"),
        (SETTINGS, MACHINE, [dataclasses.replace(identity, name="other")], "bundle 1's name was llava, is other"),
        (SETTINGS, dataclasses.replace(MACHINE, cores=4), [identity], "the machine's cores was 8, is 4"),
        (dataclasses.replace(SETTINGS, threads=2), MACHINE, [identity], "the run's threads was 4, is 2"),
    ):
        with pytest.raises(MeasurementError, match=message):
            check_comparable(path, earlier, settings, machine, identities)


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("2.5", 0.025), ("0%", 0.0)])
def test_percentages(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["ten", "", "-1%", "nan", "inf%"])
def test_what_is_no_percentage(text: str) -> None:
    with pytest.raises(RequestError, match="expected a percentage"):
        parse_share(text)


def test_ratios_are_against_the_first_and_the_prediction() -> None:
    slower = dataclasses.replace(
        bundle_run(2.0, 3.0, (1.0,)),
        predicted=Predicted(
            "agx", {"ttft_sec": 1.6, "decode_tokens_per_sec": 1.0}, {"picture": 500_000_000}, 2_000_000_000
        ),
    )
    table = {row.label: row.cells for row in rows(report(bundle_run(values=(1.0,)), slower))}
    first, second = table["first token"]
    assert (first.measured, first.predicted) == ("1 s", "")
    assert (second.ratio, second.predicted, second.of_predicted) == ("2x", "1.6 s", "1.25x")
    assert table["decode"][1].ratio == "0.5x"
    assert table["RSS, peak of picture"][1].of_predicted == "2x" and table["PSS after picture"][1].predicted == ""
    assert (table[PEAK_LABEL][1].ratio, table[PEAK_LABEL][1].of_predicted) == ("1.5x", "1.5x")


def test_the_page_stands_alone_and_escapes_what_it_shows() -> None:
    run = dataclasses.replace(
        bundle_run(values=(1.0, 1.4)), predicted=Predicted("agx", {"ttft_sec": 1.6}, {}, 2_000_000_000)
    )
    text = page(report(run, bundle_run()))
    assert "<script" not in text and "http" not in text and "src=" not in text
    assert "it was &lt;busy&gt;" in text and "a &lt;fast&gt; CPU" in text
    assert '<td class="disturbed">! 1.2 s (33%)</td>' in text
    assert "predicted for agx" in text and text.count("<svg") == 3
