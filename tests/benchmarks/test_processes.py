"""Peak memory of other processes."""

import sys

import pytest

from benchmarks.processes import run_measured


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
