"""``vz-edge doctor``: its table, its JSON, its exit status, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_cli import vz_edge
from vz_edge.device import doctor
from vz_edge.device.doctor import Finding, packages

REPOSITORY = Path(__file__).parents[2]
OK = Finding("memory", "ok", "12.3 GB available of 16.4 GB")
NO_RUN = Finding("CPUExecutionProvider", "problem", "does not start", "pip install it again", "run")
NO_EXPORT = Finding(
    "export packages", "problem", "torch missing (expected >=2.6)", "pip install 'torch>=2.6'", "export"
)
SLOW = Finding("power mode", "warning", "15W caps the clocks", "sudo nvpmodel -m 0", "run")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def become(*findings: Finding, exports: bool = True) -> None:
        monkeypatch.setattr(doctor, "diagnose", lambda: iter(findings))
        monkeypatch.setattr(packages, "export_is_expected", lambda: exports)
        monkeypatch.setattr("vz_edge.host.doctor.bitsandbytes_findings", lambda: [])

    return become


def test_a_healthy_machine(machine: Callable[..., None]) -> None:
    machine(OK, SLOW)
    done = vz_edge("doctor")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-2:] == ["running will work", "exporting will work"]
    assert "fix: sudo nvpmodel -m 0" in done.stdout and done.stdout.count("fix:") == 1


@pytest.mark.parametrize(
    ("findings", "exports", "status"),
    [((NO_RUN,), True, 2), ((NO_RUN,), False, 2), ((NO_EXPORT,), True, 2), ((NO_EXPORT,), False, 0)],
)
def test_the_status_says_whether_it_will_work(
    machine: Callable[..., None], findings: tuple[Finding, ...], exports: bool, status: int
) -> None:
    machine(OK, *findings, exports=exports)
    done = vz_edge("doctor")
    assert done.returncode == status and done.stderr == ""
    what = "running" if NO_RUN in findings else "exporting"
    assert f"\n{what} will not work: {findings[0].name}: {findings[0].detail}" in done.stdout
    assert f"fix: {findings[0].fix}" in done.stdout


def test_json_holds_every_finding_and_both_verdicts(machine: Callable[..., None]) -> None:
    machine(OK, NO_RUN)
    done = vz_edge("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 2
    assert report["findings"][1] == {
        "name": "CPUExecutionProvider",
        "state": "problem",
        "detail": "does not start",
        "fix": "pip install it again",
        "needed_for": "run",
    }
    assert report["exporting"] == {"will_work": True, "reasons": []}
    assert report["running"] == {"will_work": False, "reasons": ["CPUExecutionProvider: does not start"]}


def test_a_real_run_leaves_no_file_and_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from vz_edge.cli import app\n"
        "try: app(['doctor', '--json'])\n"
        "finally: print(sorted({'torch', 'transformers', 'onnxruntime', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    report = json.loads(done.stdout)
    states = {finding["name"]: finding["state"] for finding in report["findings"]}
    assert states["4-bit MatMulNBits on CPU"] == states["onnxruntime build"] == "ok"
    assert report["running"] == {"will_work": True, "reasons": []}
    assert done.returncode == (0 if report["exporting"]["will_work"] else 2)
    assert done.stderr.strip() == "[]"
    assert list(tmp_path.iterdir()) == []
