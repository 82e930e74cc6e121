"""Memory and time of one answer about a picture from an exported 13B, on the CPU.

    python -m benchmarks.answer_memory                          # llava-next-13b at 4 bits and 320 tokens

The bundle is the one that ``export_memory --shape llava-next-13b`` left; it is exported now if it is not there.
A fresh process imports vz_edge, loads the bundle, encodes a 1000 x 800 picture (five tiles, 320 tokens) and
answers a question in 32 tokens; after each stage it reads its resident memory (``VmRSS``) and the highest it has
been (``VmHWM``). Files that are memory-mapped count in both. The first answer pays for pages that are touched for
the first time, so a second question is asked too, and the picture is looked at once more.

There are two such processes: one gives back what the picture took of memory (``release_memory=True``, which EdgeModel
does by itself where memory is short), the other keeps it. The bar is on the first: it is what the model needs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import bundles
from benchmarks.report import GB, REPORTS, Bar, Cell, Report, Samples
from vz_edge.profiling.environment import busy_percent
from vz_edge.profiling.process_memory import memory_bytes

SHAPE = "llava-next-13b"
PEAK_LIMIT_GB = 9.5
QUESTION = "What is on the table, and what is to the left of it?"
ANSWER_TOKENS = 32
RELEASED, KEPT = MODES = ("given back", "kept")
PICTURE_SIZE = (800, 1000, 3)  # height, width, channels


def answer(bundle: Path, threads: int, release_memory: bool) -> dict:
    """Load and ask; returns seconds and memory after each stage, and the reply's own measurements."""
    stages: list[dict] = []
    began = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        stages.append({"stage": name, "sec": now - began, **memory_bytes()})
        began = time.perf_counter()

    from vz_edge import EdgeModel

    stage("import")
    model = EdgeModel.load(bundle, threads=threads, release_memory=release_memory)
    stage("load the bundle")
    picture = np.random.default_rng(0).integers(0, 256, PICTURE_SIZE, dtype=np.uint8)
    encoded = model.encode(picture)
    stage("picture: tiles and vision graph")
    first = model.ask(encoded, QUESTION, max_new_tokens=ANSWER_TOKENS)
    stage("first question")
    second = model.ask(encoded, QUESTION, max_new_tokens=ANSWER_TOKENS)
    stage("second question")
    model.encode(picture)
    stage("the picture again")
    measured = (
        "prompt_tokens",
        "image_tokens",
        "answer_tokens",
        "prefill_sec",
        "prefill_tokens_per_sec",
        "decode_sec",
        "decode_tokens_per_sec",
    )
    replies = [{name: getattr(reply, name) for name in measured} for reply in (first, second)]
    return {"stages": stages, "replies": replies}


def _measured(bundle: Path, threads: int, mode: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.answer_memory", "--worker", str(bundle), "--threads", str(threads)]
    done = subprocess.run([*command, "--mode", mode], stdout=subprocess.PIPE, check=True, text=True)
    found: dict = json.loads(done.stdout)
    return found


def report(shape: str, bundle: Path, threads: int, busy: float) -> Report:
    """Run ``answer`` in processes of its own and tabulate it."""
    measured = {mode: _measured(bundle, threads, mode) for mode in MODES}
    rows: list[dict[str, Cell]] = [
        {
            "memory of a picture": mode,
            "stage": stage["stage"],
            "time": Samples((stage["sec"],), "s"),
            "resident after": Samples((stage["VmRSS"] / GB,), "GB"),
            "of it files": Samples((stage["RssFile"] / GB,), "GB"),
            "highest so far": Samples((stage["VmHWM"] / GB,), "GB"),
        }
        for mode, found in measured.items()
        for stage in found["stages"]
    ]
    notes = ["Random weights of the true shape. 1 GB is 1e9 bytes; memory-mapped files count as resident memory."]
    replies = measured[RELEASED]["replies"]
    for name, reply in zip(("first", "second"), replies, strict=True):
        notes.append(
            f"The {name} question: {reply['image_tokens']} picture and {reply['prompt_tokens']} text tokens read in "
            f"{reply['prefill_sec']:.1f} s ({reply['prefill_tokens_per_sec']:.1f} tokens/s), {reply['answer_tokens']} "
            f"written in {reply['decode_sec']:.1f} s ({reply['decode_tokens_per_sec']:.2f} tokens/s)."
        )
    peak_gb = max(stage["VmHWM"] for stage in measured[RELEASED]["stages"]) / GB
    size_gb = bundles.folder_bytes(bundle) / GB
    return Report(
        name="answer_memory" if shape == SHAPE else f"answer_memory_{shape}",
        title=f"{shape} at 4 bits and 320 tokens answers on the CPU: the folder is {size_gb:.2f} GB",
        busy_percent=busy,
        notes=notes,
        rows=rows,
        bars=[Bar("peak resident memory, given back", peak_gb, "<=", PEAK_LIMIT_GB, "GB")] if shape == SHAPE else (),
        settings={"threads": threads, "replies": json.dumps(replies)},
    )


def main() -> None:
    """Parse the command line; measure, or be the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=SHAPE, help="a recipe's name, 1b or tiny")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--reports", type=Path, default=REPORTS)
    parser.add_argument("--worker", type=Path, metavar="BUNDLE", help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(answer(arguments.worker, arguments.threads, arguments.mode == RELEASED)))
        return
    busy = busy_percent()
    bundle = bundles.bundle(arguments.shape, "cpu", arguments.work)
    report(arguments.shape, bundle, arguments.threads, busy).write(arguments.reports)


if __name__ == "__main__":
    main()
