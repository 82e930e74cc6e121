"""NVIDIA's management library (NVML, the package nvidia-ml-py): memory and names of the GPUs.

Optional. Where the package or the driver is absent, or a GPU does not tell (a Jetson's has no memory of its own),
nothing is known: None or an empty list. ``missing`` says why.
"""

from __future__ import annotations

import ctypes
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
    if missing():
        return []
    import pynvml

    try:
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        return [pynvml.nvmlDeviceGetName(gpu) for gpu in gpus]
    except pynvml.NVMLError:
        return []


def free_bytes(device: int = 0) -> int | None:
    """Free memory of a GPU; ``device`` is its number as CUDA counts."""
    return _of_gpu(device, lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).free)


def used_bytes(device: int = 0) -> int | None:
    """Memory in use on a GPU, all processes together, as nvidia-smi shows it.

    NVML's first kind of answer counts what the driver keeps for itself as used (half a gigabyte of a large card), its
    second does not (nvmlMemory_v2_t in NVIDIA's NVML reference); the first is taken where there is no second.
    """

    def used(nvml: Any, gpu: Any) -> int:
        try:
            found: int = nvml.nvmlDeviceGetMemoryInfo(gpu, nvml.nvmlMemory_v2).used
        except (AttributeError, TypeError, nvml.NVMLError):  # an older package or driver
            found = nvml.nvmlDeviceGetMemoryInfo(gpu).used
        return found

    return _of_gpu(device, used)


def process_bytes(device: int = 0) -> int | None:
    """Memory of this process on a GPU, CUDA context included.

    None where NVML does not list it: before its first use of the GPU, and in a container without the host's process
    ids (``docker run --pid=host``).
    """
    processes = _of_gpu(device, lambda nvml, gpu: nvml.nvmlDeviceGetComputeRunningProcesses(gpu)) or []
    known = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return None if None in known or not known else sum(known)


def cuda_bus_id(device: int) -> str | None:
    """The PCI bus id of a GPU that CUDA numbers ``device``; None where there is no driver, or no such GPU.

    CUDA counts those of CUDA_VISIBLE_DEVICES alone, by default the fastest first; NVML counts all by their bus.
    Source: cuDeviceGetPCIBusId of the CUDA driver API.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    handle, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(handle), device)
        or cuda.cuDeviceGetPCIBusId(text, len(text), handle)
    )
    return None if failed else text.value.decode("ascii")


def _of_gpu(device: int, question: Callable[[Any, Any], T]) -> T | None:
    """The answer of a GPU to ``question(pynvml, handle)``; None where NVML is missing or it does not answer."""
    if missing():
        return None
    import pynvml

    bus_id = cuda_bus_id(device)
    try:
        gpu = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id) if bus_id else pynvml.nvmlDeviceGetHandleByIndex(device)
        return question(pynvml, gpu)
    except pynvml.NVMLError:
        return None
