"""The check of ``vz-edge doctor`` that needs torch: a 4-bit kernel of bitsandbytes, run and compared.

ONNX bundles do without bitsandbytes; who exports with ``--format bnb``, runs such a bundle or compares with it learns
here whether its kernels run.
"""

from __future__ import annotations

import importlib.util

from vz_edge.backends.bitsandbytes_trial import MAX_DISTANCE, MAX_LOSS, TRIAL, fault
from vz_edge.device.doctor.finding import Finding
from vz_edge.device.process import Outcome, run_isolated

NAME = "bitsandbytes NF4"
BITS = 4


def bitsandbytes_findings() -> list[Finding]:
    """Try the kernel where bitsandbytes is installed; no finding where it is not."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return []
    return [bitsandbytes_finding(run_isolated(TRIAL, str(BITS)))]


def bitsandbytes_finding(trial: Outcome) -> Finding:
    """What the trial says. Never a problem: ONNX bundles are exported and run without bitsandbytes."""
    fix = "build it from source on this machine (its wheels for aarch64 do not fit L4T), or do without"
    if trial.result is None:
        return Finding(NAME, "warning", f"the first 4-bit kernel fails: {trial.failure}", fix, "export")
    device, loss, distance = (trial.result[key] for key in ("device", "loss", "distance"))
    detail = f"on {device}: weights within {loss:.1e}, product within {distance:.1e} of numpy"
    if fault(trial) is None:
        return Finding(NAME, "ok", detail, needed_for="export")
    expected = f"expected at most {MAX_LOSS} and {MAX_DISTANCE}"
    return Finding(NAME, "warning", f"wrong numbers {detail}; {expected}", fix, "export")
