"""Seconds by CUDA kernel of a prefill and of some tokens, from CUPTI by way of torch's profiler.

    python -m benchmarks.gpu.kernels BUNDLE SETTINGS

prints one line of JSON: ``{"prefill": {kernel: seconds}, "decode": {...}}``. CUPTI sees every kernel of the process,
whichever library launched it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.bare_decoder import BareDecoder
from benchmarks.gpu.stage import Settings
from benchmarks.gpu.stages.operators import PROMPT_TOKENS, STEPS
from vz_edge.device.runtime import open_session


def kernels(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of each kernel that ``run`` launches."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / 1e6
        for event in found.key_averages()
        if event.self_device_time_total > 0
    }


def main() -> None:
    """Print what was found."""
    import torch

    folder, settings = Path(sys.argv[1]), Settings(**json.loads(sys.argv[2]))
    torch.cuda.init()
    decoder = BareDecoder(
        open_session(folder / "decoder.onnx", settings.providers, threads=None), PROMPT_TOKENS + STEPS
    )
    decoder.prefill_sec(PROMPT_TOKENS)
    decoder.steps_sec(PROMPT_TOKENS, 1)
    kernels(lambda: decoder.steps_sec(PROMPT_TOKENS, 1))  # the profiler's own first use
    found = {
        "prefill": kernels(lambda: decoder.prefill_sec(PROMPT_TOKENS)),
        "decode": kernels(lambda: decoder.steps_sec(PROMPT_TOKENS, STEPS)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
