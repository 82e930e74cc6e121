"""What a person sees while an export runs."""

from __future__ import annotations

from types import TracebackType
from typing import Literal

from vz_edge.device.dependencies import require_imports, require_installed
from vz_edge.device.requirements import install_command

HOST_MODULES = ("torch", "transformers", "safetensors", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
BNB_MODULES = ("bitsandbytes", "accelerate")  # which are imported where their kernel is tried


def require_host(format_: Literal["onnx", "bnb"]) -> None:
    """Raise DependencyError naming what of the export side is not installed, or does not import."""
    bnb = format_ == "bnb"
    remedy = f"on the machine that exports, {install_command('export', *(['bnb'] if bnb else []), 'cpu')}"
    require_installed("exporting", HOST_MODULES + (BNB_MODULES if bnb else ()), f"{remedy} (a device needs none of it)")
    require_imports("exporting", HOST_MODULES, f"{remedy}, in builds for it")


class ConsoleProgress:
    """A bar a stage, advanced a tensor at a time, with rate and time left (vz_edge.host.export.Progress)."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bars = Progress(
            TextColumn("{task.fields[stage]:<18}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._task: int | None = None

    def __enter__(self) -> ConsoleProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        self._bars.stop()

    def start(self, stage: str, total_bytes: int) -> None:
        """Finish the bar of the last stage and open one for this; a stage without a size pulses."""
        self._finish()
        self._task = self._bars.add_task("", stage=stage, total=total_bytes or None)

    def advance(self, item: str, size_bytes: int) -> None:
        """Move the open bar."""
        if self._task is not None:
            self._bars.update(self._task, advance=size_bytes, description=item)  # type: ignore[arg-type]

    def _finish(self) -> None:
        if self._task is not None:
            done = self._bars.tasks[self._task].completed
            self._bars.update(self._task, description="", total=done or 1, completed=done or 1)  # type: ignore[arg-type]
