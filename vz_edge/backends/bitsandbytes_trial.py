"""``python -m vz_edge.backends.bitsandbytes_trial 4|8 [DEVICE]``: run bitsandbytes' kernel, compare it with numpy.

On a Jetson the package may import and then fail at its first kernel (its issue 1930), and its CUDA code ends the
process that it fails in; hence a process of its own (``vz_edge.device.process``) wherever CUDA is involved.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from vz_edge.device.process import Outcome, one_line, run_isolated

TRIAL = "vz_edge.backends.bitsandbytes_trial"
INPUTS, OUTPUTS = 512, 64
OUTLIER_THRESHOLD = 6.0  # of LLM.int8(), and transformers' default
# NF4 in blocks of 64 loses 9 % of normal weights (measured with numpy), LLM.int8() 1 %; the product in fp16 or int8
# loses less than 2 %.
MAX_LOSS, MAX_DISTANCE = 0.15, 0.02


def kernel_trial(bits: int, device: str) -> Outcome:
    """Try the kernels of ``bits`` on ``device`` ("cpu", "cuda:0"): here on the CPU, in a process of its own on CUDA."""
    if device != "cpu":
        return run_isolated(TRIAL, str(bits), device)
    try:
        return Outcome(try_kernel(bits, device))
    except Exception as error:  # whatever a native package raises where its library does not fit
        return Outcome(None, one_line(error))


def fault(outcome: Outcome) -> str | None:
    """What is wrong with a trial's kernel, in one line; None where it computes as numpy does."""
    if outcome.result is None:
        return outcome.failure
    loss, distance = outcome.result["loss"], outcome.result["distance"]
    if loss <= MAX_LOSS and distance <= MAX_DISTANCE:
        return None
    return f"wrong numbers: weights within {loss:.1e}, product within {distance:.1e} of numpy"


def try_kernel(bits: int, device: str) -> dict[str, Any]:
    """Quantise a weight, multiply one row with it, and compare both steps with numpy.

    ``loss``: relative distance of the dequantised weight from the weight; ``distance``: of the kernel's product from
    numpy's product with the dequantised weight. One row, because of NF4 more are dequantised first and multiplied by
    cuBLAS.
    """
    import numpy as np
    import torch

    dtype = torch.float32 if device == "cpu" else torch.float16
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((OUTPUTS, INPUTS)).astype(np.float32))
    x = torch.from_numpy(rng.standard_normal((1, INPUTS)).astype(np.float32)).to(device, dtype)
    with torch.no_grad():
        y, dequantised = (_nf4 if bits == 4 else _int8)(weight.to(device, dtype), x)
    expected = x.double().cpu() @ dequantised.T
    return {
        "device": device,
        "loss": _relative(dequantised, weight.double()),
        "distance": _relative(y.double().cpu(), expected),
    }


def _nf4(weight: Any, x: Any) -> tuple[Any, Any]:
    from bitsandbytes import functional, matmul_4bit  # type: ignore[import-not-found, unused-ignore]

    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    dequantised = functional.dequantize_4bit(packed, state).double().cpu()
    return matmul_4bit(x, packed.t(), state), dequantised


def _int8(weight: Any, x: Any) -> tuple[Any, Any]:
    from bitsandbytes import functional, nn  # type: ignore[import-not-found, unused-ignore]

    rows, scales, _ = functional.int8_vectorwise_quant(weight.half())
    layer = nn.Linear8bitLt(INPUTS, OUTPUTS, bias=False, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD)
    layer.weight.data.copy_(weight.cpu())
    return layer.to(weight.device)(x.half()), (rows.double() * scales.double()[:, None] / 127).cpu()


def _relative(value: Any, expected: Any) -> float:
    return float((value - expected).norm() / expected.norm())


def main() -> None:
    """Try the kernels that the command line names, by default on CUDA where torch has it, and print JSON."""
    import torch

    bits, *named = sys.argv[1:]
    device = named[0] if named else "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps(try_kernel(int(bits), device)))


if __name__ == "__main__":
    main()
