"""Memory is read of the GPU that a model runs on, whatever CUDA and NVML call it."""

from __future__ import annotations

import ctypes
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vz_edge.device import nvml
from vz_edge.device.memory_check import available_memory_bytes
from vz_edge.device.runtime import CUDA

BUS_IDS = ("0000:01:00.0", "0000:41:00.0")  # in NVML's order


class FakeNvml(ModuleType):
    """Two GPUs, on the second of which this process holds memory."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        if number >= len(BUS_IDS):
            raise self.NVMLError("Invalid Argument")
        return number

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> int:  # noqa: N802
        return BUS_IDS.index(bus_id)

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=(100, 300)[gpu], free=(900, 700)[gpu])

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: int) -> list[Any]:  # noqa: N802
        ours = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=40)] if gpu else []
        return [SimpleNamespace(pid=1, usedGpuMemory=60), *ours]


class FakeCuda:
    """A driver whose first GPU is NVML's second: the faster one."""

    def __init__(self, name: str) -> None:
        assert name == "libcuda.so.1"

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, handle: Any, device: int) -> int:  # noqa: N802
        handle._obj.value = device
        return 0 if device < len(BUS_IDS) else 101

    def cuDeviceGetPCIBusId(self, text: Any, length: int, handle: Any) -> int:  # noqa: N802
        text.value = BUS_IDS[::-1][handle.value].encode()
        return 0


def no_library(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setattr(ctypes, "CDLL", no_library)


def test_what_the_driver_keeps_for_itself_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    card = sys.modules["pynvml"]

    def info(gpu: int, version: int = 1) -> Any:
        return SimpleNamespace(used=100 if version == 2 else 600, free=900)

    monkeypatch.setattr(card, "nvmlDeviceGetMemoryInfo", info)
    assert nvml.used_bytes() == 600, "a package without the second kind"
    monkeypatch.setattr(card, "nvmlMemory_v2", 2, raising=False)
    assert nvml.used_bytes() == 100


def test_a_gpu_is_asked_by_its_number() -> None:
    assert [nvml.free_bytes(device) for device in (0, 1, 2)] == [900, 700, None]
    assert [nvml.used_bytes(device) for device in (0, 1, 2)] == [100, 300, None]
    assert [nvml.process_bytes(device) for device in (0, 1, 2)] == [None, 40, None]


def test_cuda_says_which_gpu_its_number_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", FakeCuda)
    assert [nvml.cuda_bus_id(device) for device in (0, 1, 2)] == [*BUS_IDS[::-1], None]
    assert [nvml.free_bytes(device) for device in (0, 1)] == [700, 900]


def test_the_memory_that_is_available_is_that_gpus(tmp_path: Any) -> None:
    assert available_memory_bytes(CUDA, tmp_path) == 900
    assert available_memory_bytes((CUDA, {"device_id": "1"}), tmp_path) == 700
