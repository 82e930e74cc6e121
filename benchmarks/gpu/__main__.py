"""transformers on a GPU: random LLaVA-NeXT models of the true 7B and 13B shapes, with and without ``vz_edge.compress``.

    python -m benchmarks.gpu                                         # under eight minutes on an H100 or H200
    python -m benchmarks.gpu --only 13B 4-bit 320                    # some of it; words of one kind are alternatives
    python -m benchmarks.gpu --device cpu --shape small --runs 2     # tries the script without a GPU

Needs torch, transformers and bitsandbytes, and no network: the models are made on the device. A picture fills a 2 x 2
grid, with a prompt of 70 text tokens and a greedy answer of 32 tokens, in bf16, LLM.int8() and NF4, in three ways:

* ``compress``: ``vz_edge.compress`` to 160, 320 and 640 tokens
* ``transformers``: the model as it is, with all tokens
* ``published``: the vision part the published way (benchmarks/published_vision.py), at 320 tokens

A process measures one model with one kind of weights (worker.py); it may run out of memory, or end in a kernel
that does not fit the card, without the others. What failed is a row that says so.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.gpu.configurations import ANSWER_TOKENS, PROMPT_TOKENS, SHAPES, WORDS, configurations
from benchmarks.gpu.jobs import measure
from benchmarks.gpu.report import profile_of, write_reports
from vz_edge.errors import DeviceError
from vz_edge.planning.devices import load_device
from vz_edge.profiling.environment import busy_percent


def require_device(device: str) -> None:
    """End with one line where torch has no CUDA device."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit(
                f"benchmarks.gpu: torch {torch.__version__} has no CUDA device here; run it on a machine with an "
                "NVIDIA GPU and a CUDA build of torch, or try the script with --device cpu --shape small"
            )


def main() -> None:
    """Measure and write the reports."""
    parser = argparse.ArgumentParser(
        "benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="full", help="small: a tiny model for both sizes")
    parser.add_argument("--only", nargs="+", default=[], choices=tuple(WORDS), metavar="WORD", help=", ".join(WORDS))
    parser.add_argument("--profile", help="predict for this device; default: the card's own, where there is one")
    parser.add_argument("--runs", type=int, default=10, help="after two that are not counted")
    reports = Path(os.environ.get("OUT") or "build/reports")
    parser.add_argument("--reports", type=Path, default=reports, help="default: $OUT, or build/reports")
    arguments = parser.parse_args()
    chosen = configurations(arguments.only)
    if not chosen:
        parser.error(f"--only {' '.join(arguments.only)}: nothing is all of that; published is measured at 320 alone")
    require_device(arguments.device)
    try:
        profile = load_device(arguments.profile) if arguments.profile else None
    except DeviceError as error:
        parser.error(str(error))
    busy = busy_percent()
    found = measure(chosen, arguments.device, arguments.shape, arguments.runs)
    device_name = next((result["device_name"] for result in found.values() if "device_name" in result), "unknown")
    write_reports(
        found,
        device_name,
        profile or profile_of(device_name),
        SHAPES[arguments.shape],
        busy,
        {"runs": arguments.runs, "prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS},
        arguments.reports,
    )


if __name__ == "__main__":
    main()
