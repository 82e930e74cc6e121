"""``vz-edge devices`` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vz_edge.cli import app
from vz_edge.planning.devices import DeviceProfile, device_names, load_device


def test_devices_are_listed_with_every_figures_source() -> None:
    done = CliRunner().invoke(app, ["devices", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert sorted(row["name"] for row in rows) == device_names()
    assert all(row["bandwidth_bytes_per_sec"]["source"] for row in rows)


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_table_names_every_device_whole(columns: str) -> None:
    done = CliRunner().invoke(app, ["devices"], env={"COLUMNS": columns})
    assert done.exit_code == 0, done.output
    assert all(name in done.stdout for name in device_names())


@pytest.mark.parametrize("name", device_names())
def test_a_profile_is_printed_to_start_another_with(tmp_path: Path, name: str) -> None:
    done = CliRunner().invoke(app, ["devices", name, "--yaml"])
    (tmp_path / "mine.yaml").write_text(done.stdout.replace(f"name: {name}\n", "name: mine\n"))
    mine = load_device(tmp_path / "mine.yaml")
    assert mine == DeviceProfile(**{**vars(load_device(name)), "name": "mine"})
    again = CliRunner().invoke(app, ["devices", str(tmp_path / "mine.yaml"), "--yaml"])
    assert again.exit_code == 0 and mine.title in again.stdout


def test_one_device_is_shown_with_its_sources() -> None:
    done = CliRunner().invoke(app, ["devices", "orin-nx-16"])
    assert done.exit_code == 0 and "bandwidth: 102.4 GB/s (NVIDIA Jetson Orin NX Series data sheet" in done.stdout
    assert json.loads(CliRunner().invoke(app, ["devices", "orin-nx-16", "--json"]).stdout)["name"] == "orin-nx-16"
    assert CliRunner().invoke(app, ["devices", "--yaml"]).exit_code == 2
    assert CliRunner().invoke(app, ["devices", "this"]).exit_code == 2
    assert CliRunner().invoke(app, ["devices", "orin-nx-17", "--yaml"]).exit_code == 2
