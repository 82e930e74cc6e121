"""Processes of their own: however one ends, it is a result or a reason, and leaves no file behind."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from vz_edge.device.process import command_output, run_isolated


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """``write(code)`` makes a module that ``run_isolated`` finds and gives its name; no file may be left of a run."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(code: str) -> str:
        (tmp_path / "tried_out.py").write_text(f"import json, os, signal, sys, tempfile, time\n{code}\n")
        return "tried_out"

    yield write
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("os.kill(os.getpid(), signal.SIGILL)", "the process was killed by SIGILL"),
        ("print('Error named symbol not found', file=sys.stderr); os._exit(1)", "status 1 (Error named symbol not"),
        ("print('no mapping')", "status 0"),
        ("print([1])", "status 0"),
        ("", "status 0"),
        ("time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_whatever_a_trial_dies_of_is_reported(script, code: str, failure: str) -> None:  # type: ignore[no-untyped-def]
    outcome = run_isolated(script(code), timeout_sec=1 if "sleep" in code else 60)
    assert outcome.result is None and failure in outcome.failure


def test_a_trial_answers_on_its_last_line_and_takes_its_files_along(script) -> None:  # type: ignore[no-untyped-def]
    code = (
        "open('core', 'w').close(); tempfile.mkdtemp(); print('noise')\n"
        "print(json.dumps({'args': sys.argv[1:], 'home': os.environ['CUDA_CACHE_PATH'] == os.getcwd()}))"
    )
    assert run_isolated(script(code), "one").result == {"args": ["one"], "home": True}


def test_a_command_that_is_not_there_gives_nothing() -> None:
    assert command_output("no-such-command") is None
    assert command_output(sys.executable, "-c", "raise SystemExit(1)") is None
    assert command_output(sys.executable, "-c", "print('MAXN')") == "MAXN\n"
