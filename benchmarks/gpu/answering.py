"""The process of one bundle in the stage "headline": it loads it and answers, in rounds.

    python -m benchmarks.gpu.answering BUNDLE SETTINGS --graph-tokens 0

is spoken to in lines of JSON (vz_edge.profiling.processes): ``{"what": "memory"}`` gives an answer's highest memory by
stage, ``{"what": "round", "graph": false}`` its times, and what a token took outside of ONNX Runtime (``token_sec``).
In a process with a CUDA graph an answer without it is one that is read while another context has the graph.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.card_memory import CardMeter, NoMeter
from benchmarks.gpu.loading import load
from benchmarks.gpu.stage import Settings
from vz_edge.device.process import one_line
from vz_edge.errors import MeasurementError
from vz_edge.profiling.measure import answer
from vz_edge.profiling.processes import serve
from vz_edge.profiling.run import largest_picture


def prepare(
    folder: Path, settings: Settings, answer_tokens: int, graph_tokens: int
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load the bundle; what answers requests. Raises MeasurementError with any error's text, here and there."""
    meter = CardMeter()
    meter.begin_stage()
    start = meter.end_stage()
    meter.begin_stage()
    started = time.perf_counter()
    model = _told(lambda: load(folder, settings, graph_tokens))
    loaded = {"load_sec": time.perf_counter() - started, "memory": {"start": start, "load": meter.end_stage()}}
    size = largest_picture([model.manifest.model])
    run_sec: list[float] = []  # of the runs that are no CUDA graph's: prefill, then each token
    model.decoder.run = _timed(model.decoder.run, run_sec)

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        if request["what"] == "load":
            return loaded
        if request["what"] == "memory":
            return _told(lambda: answer(model, meter, size, answer_tokens))  # type: ignore[arg-type]
        # The context is held while the answer is read: there is one graph, and the first context has it.
        holder = None if request["graph"] or not graph_tokens else model.decoder.start(1)
        run_sec.clear()
        found = _told(lambda: answer(model, NoMeter(), size, answer_tokens))  # type: ignore[arg-type]
        del holder
        found["answer_tokens"] = answer_tokens
        if not request["graph"]:
            found["token_sec"] = (found["decode_sec"] - sum(run_sec[1:])) / (answer_tokens - 1)
        return found

    return handle


def _timed(run: Callable[[Any], None], run_sec: list[float]) -> Callable[[Any], None]:
    """``run``, whose seconds are appended to ``run_sec``: the rest of a step is the loop around it."""

    def timed(binding: Any) -> None:
        started = time.perf_counter()
        run(binding)
        run_sec.append(time.perf_counter() - started)

    return timed


def _told(run: Callable[[], Any]) -> Any:
    """What ``run`` gives; ONNX Runtime's errors share no base class, and the stage wants to know them."""
    try:
        return run()
    except Exception as error:
        raise MeasurementError(one_line(f"{type(error).__name__}: {error}")) from error


def main() -> None:
    """Be the process of one bundle."""
    parser = argparse.ArgumentParser(description="Answer with one bundle; spoken to in JSON lines.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("settings")
    parser.add_argument("--answer-tokens", type=int, required=True)
    parser.add_argument("--graph-tokens", type=int, default=0)
    arguments = parser.parse_args()
    settings = Settings(**json.loads(arguments.settings))
    serve(lambda: prepare(arguments.bundle, settings, arguments.answer_tokens, arguments.graph_tokens))


if __name__ == "__main__":
    main()
