"""``python -m vz_edge.device.doctor.trial [PROVIDER]``: try onnxruntime out and print what happened as JSON.

Without a provider: the build. With one: whether a session starts on it, and how far a 4-bit MatMulNBits that runs
there is from numpy. Run in a process of its own (``vz_edge.device.process``).
"""

from __future__ import annotations

import json
import sys
from typing import Any

from vz_edge.device.doctor.matmul import make_matmul
from vz_edge.device.process import one_line
from vz_edge.device.runtime import CPU, CUDA, import_onnxruntime, preload_cuda


def describe_build() -> dict[str, Any]:
    """``version``, ``build`` (its own description), ``providers`` it lists, ``cuda`` version it was built with."""
    ort = import_onnxruntime()
    return {
        "version": ort.__version__,
        "build": one_line(ort.get_build_info()),
        "providers": ort.get_available_providers(),
        "cuda": getattr(ort, "cuda_version", ""),
    }


def try_provider(provider: str) -> dict[str, Any]:
    """``started``; then ``error`` (why the product did not run there) or ``distance`` (relative, from numpy)."""
    import numpy as np

    ort = import_onnxruntime()
    if provider == CUDA:
        preload_cuda(ort)
    # A bundle for CUDA holds fp16 graphs, any other fp32.
    case = make_matmul("float16" if provider == CUDA else "float32")

    def session(alone: bool) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        if alone:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return ort.InferenceSession(case.model, options, providers=[provider], enable_fallback=0)

    try:
        if provider not in session(alone=False).get_providers():
            return {"started": False, "error": ""}
    except Exception as error:  # onnxruntime's exceptions share no base class
        return {"started": False, "error": one_line(error)}
    try:
        (y,) = session(alone=provider != CPU).run(None, {"x": case.x})
    except Exception as error:
        return {"started": True, "error": one_line(error)}
    distance = np.linalg.norm(y.astype(np.float64) - case.expected) / np.linalg.norm(case.expected)
    return {"started": True, "error": "", "distance": float(distance)}


if __name__ == "__main__":
    print(json.dumps(try_provider(sys.argv[1]) if len(sys.argv) > 1 else describe_build()))
