"""How much of the card's memory the stages of an answer take, at their highest.

``card_bytes``     what the card has in use, as nvidia-smi shows it: other processes and the driver's own are in it
``process_bytes``  this process's, CUDA context included (NVML); absent where NVML does not list processes
``peak_rss_bytes`` highest resident memory of this process, VmHWM: the figure of a rehearsal on a processor

NVML is asked again and again while a stage runs, so that memory that a library takes and frees within it is seen where
it lasts longer than SAMPLE_SEC; ONNX Runtime's arena keeps what it took, and is read in any case when the stage ends.
"""

from __future__ import annotations

import threading

from vz_edge.device import nvml
from vz_edge.profiling.process_memory import memory_bytes, reset_peak

SAMPLE_SEC = 0.005


class CardMeter:
    """A meter of stages, as ``vz_edge.profiling.measure.answer`` takes one."""

    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._on_card = nvml.missing() is None
        self._highest: dict[str, int] = {}
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None

    def begin_stage(self) -> None:
        """A stage starts: its peak is counted from here."""
        reset_peak()
        self._highest = {}
        if self._on_card:
            self._stop.clear()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()

    def end_stage(self) -> dict[str, int]:
        """Bytes of the stage that ends, by kind."""
        if self._sampler is not None:
            self._stop.set()
            self._sampler.join()
            self._sampler = None
            self._read()
        return {**self._highest, "peak_rss_bytes": memory_bytes().get("VmHWM", 0)}

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SEC):
            self._read()

    def _read(self) -> None:
        for kind, found in (("card_bytes", nvml.used_bytes()), ("process_bytes", nvml.process_bytes())):
            if found is not None:
                self._highest[kind] = max(found, self._highest.get(kind, 0))


class NoMeter:
    """Measures nothing, and so disturbs no time."""

    notes: tuple[str, ...] = ()

    def begin_stage(self) -> None:
        """Nothing."""

    def end_stage(self) -> dict[str, int]:
        """Nothing."""
        return {}
