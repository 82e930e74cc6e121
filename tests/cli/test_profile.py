"""``vz-edge profile`` from bundle to table, report, page and exit status."""

from __future__ import annotations

import dataclasses
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.cli.test_cli import vz_edge
from tests.device import standin
from vz_edge.cli import profile
from vz_edge.profiling import processes, run
from vz_edge.profiling.run_report import RunReport, Samples, read_report

QUICK = ("--runs", "2", "--answer-tokens", "4", "--threads", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    standin.write_bundle(folder / "selected")
    standin.write_bundle(folder / "vanilla", budget=None)
    return folder


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SETTLE_SEC", 0.0)
    monkeypatch.setattr(run, "busy_percent", lambda: 0.0)


def well_formed(text: str) -> bool:
    open_tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "rect"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag != "rect":
                assert open_tags.pop() == tag

    Tags().feed(text)
    return open_tags == []


def _print_in_80_columns(report: RunReport, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row on one line, whatever was measured."""
    wide = dataclasses.replace(
        report.bundles[1],
        times={name: Samples.of([12345.678, 34567.891]) for name in report.bundles[1].times},
        bundle="/a/long/path/to/the/bundles/of/a/robot/llava-next-13b-4-bits-640-tokens",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        profile._print(dataclasses.replace(report, bundles=(report.bundles[0], wide)))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    for label in ("load", "first token", "RSS, peak of picture", "PSS after prefill", "peak memory"):
        assert sum(line.startswith(f"{label} ") for line in lines) == 2, label


def test_two_bundles_are_measured_and_compared_with_themselves(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, html = folder / "report.json", folder / "report.html"
    bundles = (folder / "selected", folder / "vanilla")
    done = vz_edge("profile", *bundles, *QUICK, "--device", "cpu", "--json", out, "--html", html)
    assert done.returncode == 0, done.stderr
    assert "first token" in done.stdout and "against the first" in done.stdout
    _print_in_80_columns(read_report(out), capsys)
    report = read_report(out)
    selected, vanilla = report.bundles
    assert (selected.tiles, selected.image_tokens) == (vanilla.tiles, 20) == (5, 20)
    assert vanilla.image_tokens > selected.image_tokens
    for measured in report.bundles:
        assert all(len(samples.values) == 2 for name, samples in measured.times.items() if name != "load_sec")
        assert measured.peak_bytes > 10_000_000
        assert measured.predicted and measured.predicted.peak_bytes > 10_000_000
        assert set(measured.predicted.times) == set(measured.times) - {"load_sec"}
    assert well_formed(html.read_text())

    data = json.loads(out.read_text())
    for bundle in data["bundles"]:
        for name, samples in bundle["times"].items():
            samples["median"] *= 1e-6 if name.endswith("per_sec") else 1e6  # slower than anything
    data["bundles"][1]["times"]["prefill_sec"]["median"] = 1e-9
    out.write_text(json.dumps(data))
    worse = vz_edge("profile", *bundles, *QUICK, "--baseline", out, "--fail-above", "5%")
    assert worse.returncode == 1
    assert worse.stderr.count("worse than") == 1 and "vanilla: prefill_sec" in worse.stderr


def test_what_cannot_be_measured_is_one_line_and_nothing_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, out = folder / "selected", folder / "never.json"
    (folder / "broken.json").write_text("{}")
    wrong = {
        "is not a bundle": (folder, *QUICK),
        "--size large: expected WIDTHxHEIGHT": (bundle, "--size", "large"),
        "--fail-above much: expected a percentage": (bundle, "--fail-above", "much"),
        "report format None": (bundle, "--baseline", folder / "broken.json"),
        "which does not exist": (bundle, "--html", folder / "absent" / "page.html"),
        "do not fit the context of 256": (bundle, *QUICK[:2], "--answer-tokens", "250"),
        "no device 'cpuu'; nearest: cpu": (bundle, "--device", "cpuu"),
        "no execution provider 'abacus'": (bundle, "--provider", "abacus"),
    }
    for message, arguments in wrong.items():
        done = vz_edge("profile", *arguments, "--json", out)
        assert done.returncode == 2, (arguments, done.stderr)
        assert message in done.stderr and done.stderr.count("vz-edge:") == 1, done.stderr
    monkeypatch.setattr(run, "available_memory_bytes", lambda provider: 1000)
    monkeypatch.setattr(sys, "executable", "/no/python/may/start")
    done = vz_edge("profile", bundle, "--json", out)
    assert done.returncode == 2 and "at least 0.00 GB of memory is needed" in done.stderr
    assert not out.exists() and not list(folder.glob(".*partial*"))
