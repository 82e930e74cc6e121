"""Measuring this machine's processor, with products so small that they take no time; and keeping the profile."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from tests.cli.test_cli import vz_edge
from vz_edge.planning.devices import load_device
from vz_edge.profiling import processor, this_machine
from vz_edge.profiling.processor import ProcessorSpeed, device_profile, measure_processor

SPEED = ProcessorSpeed(1.5e11, 3.5e11, 2.39e10, 2, 0.0, "weights read")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A cache folder of its own, and a processor that is measured in no time; how often that was done."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls: list[int] = []

    def measure(threads: int) -> ProcessorSpeed:
        calls.append(threads)
        return dataclasses.replace(SPEED, fp32_flops_per_sec=1e11 + 1e10 * len(calls))

    monkeypatch.setattr(this_machine, "measure_processor", measure)
    return calls


def test_each_figure_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = {"ROWS": 3, "OUT_FEATURES": 256, "IN_FEATURES": 256, "HIDDEN": 256, "INTERMEDIATE": 512}
    for name, value in {**small, "LEAST_BYTES": 1, "CACHES": 0, "SETTLE_SEC": 0.0}.items():
        monkeypatch.setattr(processor, name, value)
    monkeypatch.setattr(processor, "busy_percent", lambda: 12.5)
    monkeypatch.setattr(processor.tempfile, "tempdir", str(tmp_path))
    speed = measure_processor(1, rounds=1)
    assert min(speed.fp32_flops_per_sec, speed.int4_flops_per_sec, speed.bandwidth_bytes_per_sec) > 0
    assert speed.busy_percent == 12.5 and list(tmp_path.iterdir()) == []


def test_weights_are_read_from_memory_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "HIDDEN", 256)
    monkeypatch.setattr(processor, "INTERMEDIATE", 512)
    square, wide = (sum(a.nbytes for a in processor.quantised((256, width)).values()) for width in (256, 512))
    two_layers_bytes = 8 * square + 6 * wide
    assert processor.reading(tmp_path, 1, 3 * two_layers_bytes)() > 0
    assert (tmp_path / "reading.data").stat().st_size == 3 * two_layers_bytes


def test_the_weights_are_more_than_the_caches_and_less_than_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "memory_limit_bytes", lambda: None)
    monkeypatch.setattr(processor, "meminfo_bytes", lambda: {"MemAvailable": 800_000_000})
    assert processor.bytes_to_read() == 100_000_000
    monkeypatch.setattr(processor, "meminfo_bytes", lambda: {"MemAvailable": 2**50})
    assert processor.bytes_to_read() >= processor.LEAST_BYTES
    sizes = {"32768K\n": 2**25, "260M": 260 * 2**20, "8192": 8192, "?": 0, "": 0}
    assert {text: processor.cache_bytes(text) for text in sizes} == sizes


def test_the_profile_is_one_that_plans_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "board.yaml").write_text(yaml.safe_dump(device_profile("board", SPEED)))
    board = load_device(tmp_path / "board.yaml")
    assert board.device_class == "cpu" and board.peak("int8") == 3.5e11
    assert board.bandwidth_bytes_per_sec.source.endswith("weights read")
    monkeypatch.setattr(processor, "memory_limit_bytes", lambda: 2_000_000_000)
    limited = device_profile("board", SPEED)
    assert limited["memory_bytes"]["value"] == 2_000_000_000 and "control group" in limited["memory_bytes"]["source"]
    assert limited["app_memory_bytes"]["value"] == 1_000_000_000  # not 0.5 GB: half of a small board is free


def test_a_plan_measures_this_machine_once(measured: list[int]) -> None:
    first = vz_edge("plan", "--device", "this", "--json")
    assert first.returncode == 0 and "measuring this machine" in first.stderr and len(measured) == 1
    for asked in (
        ("plan", "--device", "here"),
        ("plan", "--solve", "this"),
        ("inspect", "llava-next-13b", "--device", "this"),
    ):
        done = vz_edge(*asked, "--json")
        assert done.returncode == 0 and done.stderr == "" and len(measured) == 1
    anew = vz_edge("plan", "--device", "here", "--measure", "--json")
    assert len(measured) == 2 and anew.stdout != first.stdout
    assert vz_edge("plan", "--device", "this", "--json").stdout == anew.stdout and len(measured) == 2
    assert "--measure is for this machine" in vz_edge("plan", "--device", "cpu", "--measure").stderr


def test_doctor_prints_and_keeps_the_profile(measured: list[int], tmp_path: Path) -> None:
    done = vz_edge("doctor", "--measure")
    kept = next((tmp_path / "cache").rglob("this.yaml"))
    assert done.returncode == 0 and done.stdout == kept.read_text() and f"kept in {kept}" in done.stderr
    (tmp_path / "mine.yaml").write_text(done.stdout.replace("name: this", "name: mine"))
    assert load_device(tmp_path / "mine.yaml").peak("fp32") == 1.1e11
    assert vz_edge("doctor", "--measure", "-q").stderr == ""
    assert '"name": "this"' in vz_edge("doctor", "--measure", "--json").stdout


def test_another_machine_or_a_broken_file_is_measured_anew(
    measured: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    this_machine.this_machine(False, print)
    next((tmp_path / "cache").rglob("this.yaml")).write_text("name: [")
    this_machine.this_machine(False, print)
    assert len(measured) == 2
    monkeypatch.setattr(this_machine, "meminfo_bytes", lambda: {"MemTotal": 1})
    this_machine.this_machine(False, print)
    assert len(measured) == 3 and len(list((tmp_path / "cache").rglob("this.yaml"))) == 2


def test_a_cache_that_cannot_be_written_is_said(measured: list[int], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    said: list[str] = []
    assert this_machine.this_machine(False, said.append).peak("fp32") == 1.1e11
    assert any(line.startswith("not kept") for line in said)


def test_what_cannot_be_is_neither_kept_nor_used(
    measured: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    impossible = dataclasses.replace(SPEED, fp32_flops_per_sec=1.0)
    monkeypatch.setattr(this_machine, "measure_processor", lambda threads: impossible)
    done = vz_edge("doctor", "--measure")
    assert done.returncode == 2 and "impossible for a cpu" in done.stderr and not (tmp_path / "cache").exists()
