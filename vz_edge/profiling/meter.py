"""How much memory the stages of an answer take, read by the process that is measured.

``peak_rss_bytes``  highest resident memory of the process in the stage (VmHWM)
``pss_bytes``       its proportional set size when the stage ends
``gpu_bytes``       its memory on the graphics card that it runs on when the stage ends (NVML)
``unified_bytes``   what the system's available memory fell by, on a Jetson, whose GPU allocations are in no process's
                    resident memory

The last two are no peaks by themselves, but ONNX Runtime's CUDA arena keeps what it once took, so that the reading
after a stage is the most that was needed so far; memory that a library takes past the arena and frees is missed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from vz_edge.device import nvml
from vz_edge.device.machine import l4t_release
from vz_edge.device.memory_check import available_memory_bytes
from vz_edge.device.runtime import CPU, Provider, device_of, provider_name
from vz_edge.profiling.process_memory import memory_bytes, pss_bytes, reset_peak

MemoryKind = Literal["peak_rss_bytes", "pss_bytes", "gpu_bytes", "unified_bytes"]
MEMORY_KINDS: tuple[MemoryKind, ...] = get_args(MemoryKind)


class SharedMemory:
    """This process's part of memory that is only known as a whole.

    What changes between ``begin`` and ``read`` is taken to be this process's doing, which is right while the others
    wait for their turn.
    """

    def __init__(self, used_bytes: Callable[[], int]) -> None:
        self._used_bytes = used_bytes
        self._own_bytes = 0
        self._others_bytes = 0

    def begin(self) -> None:
        """A turn of this process starts."""
        self._others_bytes = self._used_bytes() - self._own_bytes

    def read(self) -> int:
        """Bytes that are this process's."""
        self._own_bytes = self._used_bytes() - self._others_bytes
        return self._own_bytes


class MemoryMeter:
    """Reads memory stage by stage; ``notes`` say what could not be measured, or only in another way."""

    def __init__(self, provider: Provider, root: Path = Path("/")) -> None:
        self._device, on_cpu = device_of(provider), provider_name(provider) == CPU
        self.notes: list[str] = []
        self._shared: tuple[MemoryKind, SharedMemory] | None = None
        self._asks_nvml = False
        if not on_cpu and l4t_release(root) is not None:
            self._shared = "unified_bytes", SharedMemory(lambda: -(available_memory_bytes(CPU, root) or 0))
        elif not on_cpu:
            self._prepare_gpu()

    def _prepare_gpu(self) -> None:
        if reason := nvml.missing():
            self.notes.append(f"GPU memory was not measured: {reason}")
        elif nvml.used_bytes(self._device) is None:
            self.notes.append("GPU memory was not measured: NVML does not tell it for this GPU")
        else:
            self._asks_nvml = True
            self._shared = "gpu_bytes", SharedMemory(lambda: nvml.used_bytes(self._device) or 0)

    def begin_turn(self) -> None:
        """Loading or a round starts; other processes wait."""
        if self._shared:
            self._shared[1].begin()

    def begin_stage(self) -> None:
        """A stage starts: its peak is counted from here."""
        if not reset_peak():
            self._note("the kernel cannot reset VmHWM: a stage's peak is the highest since the process started")

    def end_stage(self) -> dict[MemoryKind, int]:
        """Bytes of the stage that ends, by kind."""
        found: dict[MemoryKind, int] = {}
        if (peak := memory_bytes().get("VmHWM")) is not None:
            found["peak_rss_bytes"] = peak
        if (pss := pss_bytes()) is not None:
            found["pss_bytes"] = pss
        if self._shared:
            kind, shared = self._shared
            found[kind] = shared.read()
        if self._asks_nvml:
            self._ask_nvml(found)
        return found

    def _ask_nvml(self, found: dict[MemoryKind, int]) -> None:
        """Replace the difference of the whole card's memory by NVML's own figure for this process, where it has one."""
        if (own := nvml.process_bytes(self._device)) is not None:
            found["gpu_bytes"] = own
        else:
            self._note("NVML does not list this process: its GPU memory is the change of the whole card's")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
