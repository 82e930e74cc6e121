"""What an export with bitsandbytes weights costs: peak resident memory, time and disk, in processes of their own.

    python -m benchmarks.bnb_export --shape llava-next-13b     # 26.7 GB of shards, 4 and 8 bits
    python -m benchmarks.bnb_export --shape tiny --reports build/reports

Each export goes through the command line as a user's does (``vz-edge export --format bnb --tokens 320 --target
cuda``) with everything it includes: tower, parity check in transformers, hashes. Every run starts with the shards out
of the page cache, and its time includes the flush to disk. Peak memory counts all that is resident, memory-mapped
pages too (processes.py). A bundle is removed once it is measured.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks import bundles
from benchmarks.export_memory import PEAK_LIMIT_GB, Measurements
from benchmarks.report import GB, REPORTS, Bar, Report
from vz_edge.profiling.environment import busy_percent

NAMES = {4: "NF4, double quantisation", 8: "LLM.int8()"}


def export_command(checkpoint: Path, bits: int, out: Path) -> list[str]:
    """The export that is measured."""
    options = ["--format", "bnb", "--bits", str(bits), "--tokens", "320", "--target", "cuda"]
    return [sys.executable, "-m", "vz_edge", "export", "--model", str(checkpoint), *options, "--out", str(out)]


def measure(shape: str, work: Path, rounds: int, busy: float) -> Report:
    """Exports at 4 and 8 bits in turn."""
    checkpoint = bundles.checkpoint_folder(shape, work)
    shards = bundles.shards(checkpoint)
    input_bytes = sum(path.stat().st_size for path in shards)
    exports = {bits: Measurements(input_bytes) for bits in NAMES}
    for number in range(rounds):
        for bits, measurements in exports.items():
            out = work / f"{shape}-bnb{bits}"
            bundles.drop_from_page_cache(shards)
            command = export_command(checkpoint, bits, out)
            measurements.run(command, out, work / "logs" / f"{out.name}-{number}.log")
            shutil.rmtree(out)
    bars = [
        Bar(f"peak memory, {bits} bits", max(measurements.peak_bytes) / GB, "<=", PEAK_LIMIT_GB, "GB")
        for bits, measurements in exports.items()
    ]
    return Report(
        name=f"bnb_export_{shape}",
        title=f"Export of {shape} ({input_bytes / GB:.1f} GB of bf16 shards) with bitsandbytes weights, 320 tokens",
        busy_percent=busy,
        notes=[
            "Random weights of the true shape. Each run starts with the shards out of the page cache (posix_fadvise) "
            "and its time includes the flush to disk (sync).",
            "An export's time is all of it: vision graph, token table, checkpoint, parity check against torch, hashes.",
            "Peak memory is resident memory at its highest, memory-mapped pages counted. 1 GB is 1e9 bytes.",
        ],
        rows=[measurements.row(f"--bits {bits} ({NAMES[bits]})") for bits, measurements in exports.items()],
        bars=() if shape == "tiny" else bars,
    )


def main() -> None:
    """Parse the command line, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-next-13b", help="a recipe's name, 1b or tiny")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--reports", type=Path, default=REPORTS)
    arguments = parser.parse_args()
    measure(arguments.shape, arguments.work, arguments.rounds, busy_percent()).write(arguments.reports)


if __name__ == "__main__":
    main()
