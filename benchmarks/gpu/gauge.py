"""Time and memory of a stage, on a GPU or, so that the benchmark can be tried, on a processor.

Time is taken between marks: CUDA events, or the clock. Memory of a stage is

``peak_bytes``       what was taken of the card at the most, as nvidia-smi shows it: torch's segments, the CUDA
                     context, and whatever other processes have. On a processor VmHWM
``allocated_bytes``  torch's tensors at the most (torch.cuda.max_memory_allocated); CUDA alone
``reserved_bytes``   torch's segments at the most (torch.cuda.max_memory_reserved); CUDA alone
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from vz_edge.profiling.process_memory import memory_bytes, reset_peak


class CudaGauge:
    """Measures on the current CUDA device."""

    @property
    def device_name(self) -> str:
        """As torch calls it."""
        return torch.cuda.get_device_name()

    def mark(self) -> Any:
        """A moment on the device, when all that was asked for before is done."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Seconds from each mark to the next."""
        torch.cuda.synchronize()
        return [first.elapsed_time(second) / 1000 for first, second in pairwise(marks)]

    def begin_stage(self) -> None:
        """A stage starts: its peaks are counted from here."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def end_stage(self) -> dict[str, int]:
        """Bytes of the stage that ends. Segments that were given back within it are counted."""
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.max_memory_reserved()
        return {
            "peak_bytes": total - free + reserved - torch.cuda.memory_reserved(),
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": reserved,
        }

    def release(self) -> None:
        """Give memory back that no tensor needs."""
        gc.collect()
        torch.cuda.empty_cache()


class CpuGauge:
    """Measures this process."""

    device_name = "cpu"

    def mark(self) -> Any:
        """Now."""
        return time.perf_counter()

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Seconds from each mark to the next."""
        return [second - first for first, second in pairwise(marks)]

    def begin_stage(self) -> None:
        """A stage starts: its peak is counted from here."""
        reset_peak()

    def end_stage(self) -> dict[str, int]:
        """Bytes of the stage that ends."""
        return {"peak_bytes": memory_bytes().get("VmHWM", 0)}

    def release(self) -> None:
        """Give memory back that no tensor needs."""
        gc.collect()


Gauge = CudaGauge | CpuGauge
GAUGES: dict[str, type[CudaGauge] | type[CpuGauge]] = {"cuda": CudaGauge, "cpu": CpuGauge}
