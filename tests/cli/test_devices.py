"""``vz-edge devices`` as a person meets it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vz_edge.cli import app
from vz_edge.planning.devices import device_names


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
