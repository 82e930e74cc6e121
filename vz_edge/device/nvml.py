"""NVIDIA's management library (NVML, the package nvidia-ml-py): memory and names of the GPUs.

Optional. Where the package or the driver is absent, or a GPU does not tell (a Jetson's has no memory of its own),
nothing is known: None or an empty list. ``missing`` says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def missing() -> str | None:
    """Why NVML cannot be asked, in one line; None where it can."""
    try:
        import pynvml
    except ImportError:
        return "nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"NVML did not start ({error})"
    return None


def gpu_names() -> list[str]:
    """Names of the GPUs in NVML's order."""
    return _of_each_gpu(lambda nvml, gpu: nvml.nvmlDeviceGetName(gpu))


def free_bytes() -> int | None:
    """Free memory of the GPU that has most of it."""
    return max(_of_each_gpu(lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).free), default=None)


def used_bytes() -> int | None:
    """Memory in use, all processes and GPUs together."""
    used = _of_each_gpu(lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used)
    return sum(used) if used else None


def process_bytes() -> int | None:
    """Memory of this process on all GPUs, CUDA context included.

    None where NVML does not list it: before its first use of a GPU, and in a container without the host's process
    ids (``docker run --pid=host``).
    """
    processes = _of_each_gpu(lambda nvml, gpu: nvml.nvmlDeviceGetComputeRunningProcesses(gpu))
    ours = [process.usedGpuMemory for listed in processes for process in listed if process.pid == os.getpid()]
    known = [used for used in ours if used is not None]
    return sum(known) if known else None


def _of_each_gpu(question: Callable[[Any, Any], T]) -> list[T]:
    """The answer of each GPU to ``question(pynvml, handle)``; empty where NVML is missing or one does not answer."""
    if missing():
        return []
    import pynvml

    try:
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        return [question(pynvml, gpu) for gpu in gpus]
    except pynvml.NVMLError:
        return []
