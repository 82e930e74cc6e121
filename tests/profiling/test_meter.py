"""Memory by stage, and what is said where it cannot be measured."""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vz_edge.device import nvml
from vz_edge.device.runtime import CPU, CUDA
from vz_edge.profiling import meter
from vz_edge.profiling.meter import MemoryMeter, SharedMemory
from vz_edge.profiling.process_memory import cached_share
from vz_edge.profiling.tegrastats import ram_peak_bytes, watch_ram

MB = 1_000_000


class FakeNvml(ModuleType):
    """Two graphics cards on which this process and another hold memory."""

    class NVMLError(Exception):
        pass

    def __init__(self, listed: bool = True) -> None:
        super().__init__("pynvml")
        self.own, self.others, self.listed = 0, 500 * MB, listed

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        return number

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:  # noqa: N802
        used = (self.others, self.own)[gpu]
        return SimpleNamespace(used=used, free=1000 * MB - used)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: int) -> list[Any]:  # noqa: N802
        ours = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.own)] if gpu and self.listed and self.own else []
        return [SimpleNamespace(pid=1, usedGpuMemory=self.others // 2), *ours]


def test_a_stage_has_a_peak_of_its_own() -> None:
    measured = MemoryMeter(CPU)
    measured.begin_turn()
    measured.begin_stage()
    pages = mmap.mmap(-1, 200 * MB)  # fresh ones: malloc may hand out what is resident already
    np.frombuffer(pages, dtype=np.uint8).fill(1)
    pages.close()
    high = measured.end_stage()
    measured.begin_stage()
    low = measured.end_stage()
    assert set(high) == {"peak_rss_bytes", "pss_bytes"}
    assert high["peak_rss_bytes"] - low["peak_rss_bytes"] > 150 * MB
    assert 0 < low["pss_bytes"] < high["peak_rss_bytes"]
    assert measured.notes == []


def test_a_kernel_that_cannot_reset_the_peak_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "reset_peak", lambda: False)
    measured = MemoryMeter(CPU)
    measured.begin_stage()
    measured.begin_stage()
    assert len(measured.notes) == 1 and "cannot reset VmHWM" in measured.notes[0]


@pytest.mark.parametrize("listed", [True, False])
def test_a_process_on_a_graphics_card(monkeypatch: pytest.MonkeyPatch, listed: bool, tmp_path: Path) -> None:
    card = FakeNvml(listed)
    monkeypatch.setitem(sys.modules, "pynvml", card)
    monkeypatch.setattr(nvml, "cuda_bus_id", lambda device: None)
    measured = MemoryMeter((CUDA, {"device_id": "1"}), tmp_path)
    measured.begin_turn()
    card.own = 300 * MB
    assert measured.end_stage()["gpu_bytes"] == 300 * MB
    card.others += 200 * MB  # another rival was loaded between the turns
    measured.begin_turn()
    card.own += 50 * MB
    assert measured.end_stage()["gpu_bytes"] == 350 * MB
    assert ["does not list" in note for note in measured.notes] == ([] if listed else [True])


def test_without_nvml_the_rest_is_measured_and_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    measured = MemoryMeter(CUDA, tmp_path)
    measured.begin_turn()
    assert set(measured.end_stage()) == {"peak_rss_bytes", "pss_bytes"}
    assert measured.notes == ["GPU memory was not measured: nvidia-ml-py is not installed (pip install nvidia-ml-py)"]


def test_on_a_jetson_memory_is_what_the_system_lost(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3")
    meminfo = tmp_path / "proc/meminfo"
    meminfo.parent.mkdir()
    meminfo.write_text("MemTotal: 7802936 kB\nMemAvailable: 6000000 kB\n")
    measured = MemoryMeter(CUDA, tmp_path)
    measured.begin_turn()
    meminfo.write_text("MemTotal: 7802936 kB\nMemAvailable: 4000000 kB\n")
    assert measured.end_stage()["unified_bytes"] == 2_000_000 * 1024


def test_rivals_that_take_turns_are_told_apart() -> None:
    held = {"a": 0, "b": 0}
    rivals = {name: SharedMemory(lambda: 77 + sum(held.values())) for name in held}
    for name, amount in (("a", 100), ("b", 40), ("a", 130), ("b", 45), ("a", 120)):
        rivals[name].begin()
        held[name] = amount
        assert rivals[name].read() == amount


def test_the_page_cache_is_seen(tmp_path: Path) -> None:
    absent, present = tmp_path / "absent", tmp_path / "present"
    absent.touch()
    os.truncate(absent, 1 << 20)  # a hole that nobody has read
    present.write_bytes(bytes(1 << 20))
    assert cached_share([present]) == 1.0
    assert cached_share([absent]) == 0.0
    assert cached_share([absent, present]) == 0.5
    assert cached_share([]) is None


def test_tegrastats_lines_give_the_peak() -> None:
    lines = "\n".join(
        f"11-24-2026 12:00:0{n} RAM {used}/7620MB (lfb 4x2MB) SWAP 0/3810MB (cached 0MB) CPU [5%@1510] GR3D_FREQ 0%"
        for n, used in enumerate((3241, 5110, 4987))
    )
    assert ram_peak_bytes(lines) == 5110 << 20
    assert ram_peak_bytes("nothing") is None


def test_tegrastats_is_polled_while_the_block_runs(tmp_path: Path) -> None:
    fake, written = tmp_path / "tegrastats", tmp_path / "written"
    fake.write_text(f'#!/bin/sh\necho "RAM 12/7620MB" > "$4"\ntouch {written}\nexec sleep 60\n')
    fake.chmod(0o755)
    deadline = time.monotonic() + 30
    with watch_ram(str(fake)) as peak:
        while not written.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert peak.bytes == 12 << 20
    with watch_ram(str(tmp_path / "absent")) as peak:
        pass
    assert peak.bytes is None
