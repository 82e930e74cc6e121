"""Other processes: trials of native code, which ends the process that it fails in, and the system's commands.

A wheel for another CPU dies of an illegal instruction, and bitsandbytes' CUDA code calls ``exit(1)`` at its first
kernel where its libraries do not fit the board. A trial lives in a temporary folder, which takes its caches and
core dump along when it goes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

# A board that compiles CUDA kernels for its GPU at first use takes its time.
TIMEOUT_SEC = 120.0
CACHE_VARIABLES = ("TMPDIR", "CUDA_CACHE_PATH", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Outcome:
    """What a trial gave: its ``result``, or why there is none (``failure``, one line); ``log`` is stderr."""

    result: dict[str, Any] | None
    failure: str = ""
    log: str = ""


def run_isolated(module: str, *arguments: str, timeout_sec: float = TIMEOUT_SEC) -> Outcome:
    """Run ``python -m module arguments``, whose last line on stdout is a JSON mapping. Never raises."""
    with tempfile.TemporaryDirectory(prefix="vz-edge-trial-", ignore_cleanup_errors=True) as folder:
        environment = {
            **os.environ,
            **dict.fromkeys(CACHE_VARIABLES, folder),
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        }
        try:
            done = subprocess.run(
                [sys.executable, "-B", "-m", module, *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_sec,
            )
        except subprocess.TimeoutExpired:
            return Outcome(None, f"no answer within {timeout_sec:.0f} s")
        except OSError as error:
            return Outcome(None, f"no process could be started ({error})")
    try:
        if done.returncode == 0:
            return Outcome(dict(json.loads(done.stdout.splitlines()[-1])), log=done.stderr)
    except (ValueError, IndexError, TypeError):
        pass
    return Outcome(None, _how_it_ended(done), done.stderr)


def command_output(*command: str, timeout_sec: float = 10) -> str | None:
    """What a command prints on stdout; None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout_sec
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def one_line(error: object) -> str:
    """An exception's text, or any other, as one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def _how_it_ended(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        try:
            return f"the process was killed by {signal.Signals(-done.returncode).name}"
        except ValueError:
            return f"the process was killed by signal {-done.returncode}"
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
    return f"the process ended with status {done.returncode}" + (f" ({one_line(last)})" if last else "")
