"""One stage of ``benchmarks.gpu.truth``: its process, its time box, and what it writes down while it goes.

    python -m benchmarks.gpu.stage NAME SETTINGS

is how ``run_stage`` starts it; SETTINGS are Settings in JSON. A stage is a module of ``benchmarks.gpu.stages`` with
``run(settings, record)``. What it records is on disk at once, in ``<out>/NAME.json``, so that a stage that is killed,
or ends in native code, leaves what it had measured. That file:

``state``     "done", "failed" or "out of time"; ``why`` in one line, where it is not "done"
``wall_sec``  of the whole stage; ``box_sec``, what it was given
``line``      what the stage says of itself in the overview
``tables``    title, and rows: mappings of column to cell; a row that could not be measured has ``failed``
``blocks``    title, and lines to be pasted somewhere
``bars``      what was to be reached; ``notes``, sentences; ``measured``, every number for whoever reads on
``log``       the end of what was printed
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.report import Bar, Cell
from vz_edge.device.process import one_line
from vz_edge.device.runtime import CPU, CUDA

LOG_CHARACTERS = 4000
Device = Literal["cuda", "cpu"]
Shape = Literal["true", "tiny"]
State = Literal["done", "failed", "out of time"]


@dataclass(frozen=True)
class Settings:
    """What every stage is told. ``deadline``: a reading of ``time.time`` at which the stage is killed."""

    device: Device
    shape: Shape
    out: str
    work: str
    deadline: float = float("inf")

    @property
    def providers(self) -> tuple[str, ...]:
        """ONNX Runtime's, as the device side asks for them."""
        return (CUDA, CPU) if self.device == "cuda" else (CPU,)

    @property
    def large(self) -> str:
        """The shape of the 13B (make_checkpoint.py)."""
        return "llava-next-13b" if self.shape == "true" else "tiny"

    @property
    def small(self) -> str:
        """The shape of the 7B."""
        return "llava-next-7b" if self.shape == "true" else "tiny"

    @property
    def left_sec(self) -> float:
        """Seconds until the stage is killed."""
        return self.deadline - time.time()


class Record:
    """What a stage found so far, on disk after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {
            "state": "failed",
            "why": "the process ended before the stage did",
            "line": "",
            "tables": [],
            "bars": [],
            "blocks": [],
            "notes": [],
            "measured": {},
        }
        self._write()

    def row(self, table: str, cells: Mapping[str, Cell]) -> None:
        """Add a row to the table of that title."""
        tables = self._found["tables"]
        if not tables or tables[-1]["title"] != table:
            tables.append({"title": table, "rows": []})
        tables[-1]["rows"].append({column: str(cell) for column, cell in cells.items()})
        self._write()

    def bar(self, bar: Bar) -> None:
        """Add what was to be reached, with what was."""
        self._found["bars"].append(asdict(bar) | {"met": bar.met})
        self._write()

    def block(self, title: str, text: str) -> None:
        """Add lines to be pasted somewhere."""
        self._found["blocks"].append({"title": title, "text": text})
        self._write()

    def note(self, text: str) -> None:
        """Add a sentence, once."""
        if text not in self._found["notes"]:
            self._found["notes"].append(text)
            self._write()

    def measured(self, name: str, value: Any) -> None:
        """Keep a number, or a structure of them, under ``name``."""
        self._found["measured"][name] = value
        self._write()

    def line(self, text: str) -> None:
        """What the overview says of this stage."""
        self._found["line"] = text
        self._write()

    def end(self, state: State, why: str = "") -> None:
        """The stage is over."""
        self._found |= {"state": state, "why": why}
        self._write()

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self._path)


@dataclass(frozen=True)
class Stage:
    """``name`` is its module in ``benchmarks.gpu.stages``; ``box_sec`` the most seconds that it may take."""

    name: str
    title: str
    box_sec: float


def run_stage(stage: Stage, settings: Settings, box_sec: float) -> dict[str, Any]:
    """Run a stage in a process of its own, kill it at the end of ``box_sec``, and return what it wrote down."""
    path = Path(settings.out) / f"{stage.name}.json"
    log_path = Path(settings.work) / f"{stage.name}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    told = dataclasses.replace(settings, deadline=time.time() + box_sec)
    command = [sys.executable, "-m", "benchmarks.gpu.stage", stage.name, json.dumps(asdict(told))]
    started = time.monotonic()
    with log_path.open("wb") as log:
        # A session of its own, so that the processes that it starts die with it.
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            status: int | None = process.wait(timeout=box_sec)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _kill_session(process)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"tables": [], "bars": [], "notes": []}
    found |= {"wall_sec": round(time.monotonic() - started, 1), "box_sec": round(box_sec, 1)}
    text = log_path.read_text(encoding="utf-8", errors="replace")
    if status is None:
        found |= {"state": "out of time", "why": f"killed after {box_sec:.0f} s"}
    elif status != 0 and found.get("state") != "done":
        found |= {"state": "failed", "why": _how_it_ended(status, text, found.get("why", ""))}
    found["log"] = text[-LOG_CHARACTERS:]
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _how_it_ended(status: int, log: str, said: str) -> str:
    if status > 0 and said and "ended before" not in said:
        return said
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
    ended = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"{ended} ({one_line(last)})" if last else ended


def main() -> None:
    """Be one stage."""
    name, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    record = Record(Path(settings.out) / f"{name}.json")
    try:
        importlib.import_module(f"benchmarks.gpu.stages.{name}").run(settings, record)
    except BaseException as error:
        record.end("failed", one_line(f"{type(error).__name__}: {error}"))
        raise
    record.end("done")


if __name__ == "__main__":
    main()
