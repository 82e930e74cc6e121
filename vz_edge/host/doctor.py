"""The check of ``vz-edge doctor`` that needs torch: a 4-bit kernel of bitsandbytes, run and compared.

vz-edge does without bitsandbytes; who compares with it learns here whether its kernels run. On a Jetson they may not
although the package imports (its issue 1930). ``python -m vz_edge.host.doctor`` makes the trial and prints JSON; it
has a process of its own because the CUDA code ends the process that it fails in.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from vz_edge.device.doctor.finding import Finding
from vz_edge.device.doctor.process import Outcome, run_isolated

NAME = "bitsandbytes NF4"
INPUTS, OUTPUTS = 512, 64
# NF4 in blocks of 64 loses 9 % of normal weights (measured with numpy); the product in fp16 loses less than 1 %.
MAX_LOSS, MAX_DISTANCE = 0.15, 0.02


def bitsandbytes_findings() -> list[Finding]:
    """Try the kernel where bitsandbytes is installed; no finding where it is not."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return []
    return [bitsandbytes_finding(run_isolated("vz_edge.host.doctor"))]


def bitsandbytes_finding(trial: Outcome) -> Finding:
    """What the trial says. Never a problem: neither exporting nor running needs bitsandbytes."""
    fix = "build it from source on this machine (its wheels for aarch64 do not fit L4T), or do without"
    if trial.result is None:
        return Finding(NAME, "warning", f"the first 4-bit kernel fails: {trial.failure}", fix, "export")
    device, loss, distance = (trial.result[key] for key in ("device", "loss", "distance"))
    detail = f"on {device}: weights within {loss:.1e}, product within {distance:.1e} of numpy"
    if loss <= MAX_LOSS and distance <= MAX_DISTANCE:
        return Finding(NAME, "ok", detail, needed_for="export")
    expected = f"expected at most {MAX_LOSS} and {MAX_DISTANCE}"
    return Finding(NAME, "warning", f"wrong numbers {detail}; {expected}", fix, "export")


def try_nf4() -> dict[str, Any]:
    """Quantise a weight to NF4, multiply one row with it, and compare both steps with numpy.

    ``loss``: relative distance of the dequantised weight from the weight; ``distance``: of the kernel's product from
    numpy's product with the dequantised weight. One row, because more are dequantised first and multiplied by cuBLAS.
    """
    import numpy as np
    import torch
    from bitsandbytes import functional, matmul_4bit  # type: ignore[import-not-found, unused-ignore]

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((OUTPUTS, INPUTS)).astype(np.float32)
    x = rng.standard_normal((1, INPUTS)).astype(np.float32)
    packed, state = functional.quantize_4bit(torch.from_numpy(weight).to(device, dtype), blocksize=64, quant_type="nf4")
    dequantised = functional.dequantize_4bit(packed, state).double().cpu().numpy()
    with torch.no_grad():
        y = matmul_4bit(torch.from_numpy(x).to(device, dtype), packed.t(), state).double().cpu().numpy()
    expected = torch.from_numpy(x).to(dtype).double().numpy() @ dequantised.T
    return {"device": device, "loss": _relative(dequantised, weight), "distance": _relative(y, expected)}


def _relative(value: Any, expected: Any) -> float:
    import numpy as np

    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    print(json.dumps(try_nf4()))
