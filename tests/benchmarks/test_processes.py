"""Peak memory of other processes, and workers that answer in turn."""

import sys

import pytest

from benchmarks.processes import interleave, run_measured, workers

WORKER = """
from benchmarks.processes import serve
def prepare():
    print("what a library prints while it loads")
    return lambda request: {"name": NAME, "twice": 2 * request["value"]}
serve(prepare)
"""


@pytest.mark.parametrize("nested", [False, True])
def test_peak_memory_counts_what_was_freed_and_what_a_child_used(tmp_path, nested):
    command = [sys.executable, "-c", "x = bytearray(300_000_000); x[::4096] = b'1' * len(x[::4096]); del x"]
    if nested:
        command = [sys.executable, "-c", f"import subprocess; subprocess.run({command!r}, check=True)"]
    peak_bytes = run_measured(command, tmp_path / "log").peak_bytes
    assert 300_000_000 < peak_bytes < 450_000_000


def test_a_failing_command_ends_the_benchmark_with_its_last_words(tmp_path):
    with pytest.raises(SystemExit, match="no such thing"):
        run_measured([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path / "log")


def test_rounds_alternate_and_the_first_is_not_kept():
    commands = {name: [sys.executable, "-c", WORKER.replace("NAME", repr(name))] for name in ("a", "b")}
    with workers(commands, threads=1) as rivals:
        answers = interleave(rivals, {"value": 4}, rounds=2)
    assert answers == {name: [{"name": name, "twice": 8}] * 2 for name in ("a", "b")}
