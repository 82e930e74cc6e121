"""Reports: medians, bars and what a reader needs to compare them."""

import json

from benchmarks.report import Bar, Report, Samples


def test_samples_show_median_and_range():
    assert str(Samples((3.0, 1.0, 2.0), "s")) == "2 s (1–3)"
    assert str(Samples((8.65432,), "GB")) == "8.65 GB"
    assert str(Samples((1234.5,), "")) == "1234"
    assert str(Samples((0.0000123,), "s")) == "0.00001 s" and str(Samples((0,), "errors")) == "0 errors"


def test_a_bar_is_met_on_its_own_side():
    assert Bar("peak", 2.5, "<=", 2.5, "GB").met
    assert not Bar("peak", 2.6, "<=", 2.5, "GB").met
    assert not Bar("speed", 1.2, ">=", 1.25, "x").met


def test_a_missed_bar_is_written_down(tmp_path):
    rows = [{"rival": "ours", "time": Samples((1.0, 2.0), "s")}]
    report = Report("name", "Title", 0.0, ["A note."], rows, [Bar("peak", 3.0, "<=", 2.5, "GB")])
    report.write(tmp_path)
    data = json.loads((tmp_path / "name.json").read_text())
    assert data["rows"][0]["time"]["values"] == [1.0, 2.0]
    assert data["bars"][0]["met"] is False
    assert data["environment"]["cores"] >= 1
    text = (tmp_path / "name.md").read_text()
    assert "| peak | 3 GB | at most 2.5 GB | **no** |" in text
    assert "A note." in text
