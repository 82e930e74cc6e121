"""What an export costs: peak resident memory, time and disk, in processes of their own.

    python -m benchmarks.export_memory --shape llava-next-13b     # 26.7 GB of shards, both targets, beside `cp`
    python -m benchmarks.export_memory --shape 1b                 # beside the stock builder, interleaved rounds

Large shape: each export goes through the command line as a user's does (``vz-edge export --bits 4
--tokens 320``) with everything it includes (tower, calibration, parity check, hashes). The same shards are copied with
``cp``. Every run starts with the shards out of the page cache, and its time includes the flush to disk.

Small shape (1b, tiny): four rivals in turn. Ours as a user's, the whole bundle; the same with ``--quantizer rtn``;
ours with that, decoder and token table only; and ``python -m onnxruntime_genai.models.builder -p int4 -e cpu`` on the
same decoder, which makes no vision part. The builder rounds to nearest, so it is ours with ``rtn`` whose time is
compared with it: the default's calibration and search for better grids have no counterpart there. Here every run starts
with its input in the page cache.

Peak memory counts all that is resident, memory-mapped pages too (see processes.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import bundles
from benchmarks.processes import run_measured
from benchmarks.report import GB, REPORTS, Bar, Report, Samples
from vz_edge.profiling.environment import busy_percent

SMALL_SHAPES = ("1b", "tiny")
PEAK_LIMIT_GB = 2.5
FOLDER_LIMIT_GB = {"cpu": 8.7, "cuda": 7.9}
PEAK_LIMIT_1B_GB = 1.2
OURS, OURS_NEAREST = "vz-edge, whole bundle", "vz-edge, whole bundle, --quantizer rtn"
OURS_DECODER, STOCK = "vz-edge, decoder and token table, rtn", "onnxruntime_genai builder"


class Measurements:
    """Samples of one kind of run."""

    def __init__(self, input_bytes: int) -> None:
        self.input_bytes = input_bytes
        self.total_sec: list[float] = []
        self.cpu_sec: list[float] = []
        self.peak_bytes: list[float] = []
        self.output_bytes = 0

    def run(self, command: Sequence[str], output: Path, log: Path) -> None:
        """Run once; the time includes what the system still has to write when the command has ended."""
        shutil.rmtree(output, ignore_errors=True)
        print(f"{log.stem} ...", flush=True)
        run = run_measured(command, log)
        ended = time.perf_counter()
        os.sync()
        self.total_sec.append(run.wall_sec + time.perf_counter() - ended)
        self.cpu_sec.append(run.cpu_sec)
        self.peak_bytes.append(run.peak_bytes)
        self.output_bytes = bundles.folder_bytes(output)
        print(f"  {self.total_sec[-1]:.1f} s, peak {run.peak_bytes / GB:.2f} GB", flush=True)

    def row(self, name: str) -> dict:
        """A row of the report."""
        return {
            "run": name,
            "time": Samples(tuple(self.total_sec), "s"),
            "processor time": Samples(tuple(self.cpu_sec), "s"),
            "input read": Samples(tuple(self.input_bytes / GB / sec for sec in self.total_sec), "GB/s"),
            "peak memory": Samples(tuple(size / GB for size in self.peak_bytes), "GB"),
            "output": Samples((self.output_bytes / GB,), "GB"),
        }


def measure_large(shape: str, work: Path, rounds: int, busy: float) -> Report:
    """Exports for both targets and a plain copy, each from a cold page cache."""
    checkpoint = bundles.checkpoint_folder(shape, work)
    shards = bundles.shards(checkpoint)
    input_bytes = sum(path.stat().st_size for path in shards)
    copy = work / f"{shape}-copy"
    exports = {target: bundles.bundle_folder(shape, target, work) for target in ("cpu", "cuda")}
    rivals = {name: Measurements(input_bytes) for name in ("copy", *exports)}
    for _ in range(rounds):
        bundles.drop_from_page_cache(shards)
        copy_command = ["cp", "--reflink=never", "-R", str(checkpoint), str(copy)]
        rivals["copy"].run(copy_command, copy, work / "logs" / f"{copy.name}.log")
        shutil.rmtree(copy)
        for target, folder in exports.items():
            bundles.drop_from_page_cache(shards)
            command = bundles.export_command(str(checkpoint), target, folder)
            rivals[target].run(command, folder, work / "logs" / f"{folder.name}.log")
        shutil.rmtree(exports["cuda"])  # the CPU bundle is answer_memory's
    bars = []
    for target in exports:
        peak_gb = max(rivals[target].peak_bytes) / GB
        bars.append(Bar(f"peak memory, {target}", peak_gb, "<=", PEAK_LIMIT_GB, "GB"))
        size_gb = rivals[target].output_bytes / GB
        bars.append(Bar(f"bundle, {target}", size_gb, "<=", FOLDER_LIMIT_GB[target], "GB"))
    return Report(
        name=f"export_memory_{shape}",
        title=f"Export of {shape} ({input_bytes / GB:.1f} GB of bf16 shards) at 4 bits and 320 tokens",
        busy_percent=busy,
        notes=[
            "Random weights of the true shape. Each run starts with the shards out of the page cache (posix_fadvise) "
            "and its time includes the flush to disk (sync).",
            "An export's time is all of it: vision graph, calibration, decoder, token table, parity check against "
            "torch, hashes.",
            "Peak memory is resident memory at its highest, memory-mapped pages counted. 1 GB is 1e9 bytes.",
        ],
        rows=[
            rivals["copy"].row("plain copy (cp)"),
            *(rivals[target].row(f"vz-edge export --target {target}") for target in exports),
        ],
        bars=bars,
    )


def measure_small(shape: str, work: Path, rounds: int, busy: float) -> Report:
    """Ours and the stock builder in interleaved rounds, each from a warm page cache."""
    whole, decoder = bundles.checkpoint_folder(shape, work), bundles.checkpoint_folder(shape, work, "decoder")
    stock_out, decoder_out = work / f"{shape}-stock", work / f"{shape}-decoder-export"
    bundle, nearest_out = bundles.bundle_folder(shape, "cpu", work), work / f"{shape}-rtn-export"
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(decoder), "-o", str(stock_out)]
    runs = {
        OURS: (whole, bundles.export_command(str(whole), "cpu", bundle), bundle),
        OURS_NEAREST: (
            whole,
            bundles.export_command(str(whole), "cpu", nearest_out, *bundles.NEAREST),
            nearest_out,
        ),
        OURS_DECODER: (
            whole,
            [sys.executable, "-m", "benchmarks.export_decoder", str(whole), str(decoder_out)],
            decoder_out,
        ),
        STOCK: (decoder, [*builder, "-p", "int4", "-e", "cpu", "-c", str(work / "cache")], stock_out),
    }
    decoder_bytes = sum(path.stat().st_size for path in bundles.shards(decoder))
    whole_bytes = sum(path.stat().st_size for path in bundles.shards(whole))
    rivals = {name: Measurements(whole_bytes if name in (OURS, OURS_NEAREST) else decoder_bytes) for name in runs}
    for number in range(rounds):
        for name, (checkpoint, command, output) in runs.items():
            bundles.bring_into_page_cache(bundles.shards(checkpoint))
            rivals[name].run(command, output, work / "logs" / f"{output.name}-{number}.log")
    for folder in (stock_out, decoder_out, nearest_out):
        shutil.rmtree(folder)
    sec = {name: measurements.row(name)["time"].median for name, measurements in rivals.items()}
    bars = [
        Bar("peak memory, whole bundle", max(rivals[OURS].peak_bytes) / GB, "<=", PEAK_LIMIT_1B_GB, "GB"),
        Bar("time, whole bundle, rtn / stock builder", sec[OURS_NEAREST] / sec[STOCK], "<=", 1.0, "x"),
        Bar("time, decoder and token table, rtn / stock builder", sec[OURS_DECODER] / sec[STOCK], "<=", 1.0, "x"),
    ]
    return Report(
        name=f"export_memory_{shape}",
        title=f"Export of a {shape} checkpoint at 4 bits, beside the stock builder ({rounds} interleaved rounds)",
        busy_percent=busy,
        notes=[
            "The stock builder makes the decoder and its token embedding only. 'Whole bundle' also has the CLIP-L "
            "tower, selection and projector, the parity check against torch, and the hashes.",
            "The stock builder rounds to nearest, as ours does with rtn. Ours by default calibrates and searches for "
            "better grids; that row is what an export costs, and no bar compares it with the builder.",
            "Random weights. Each run starts with its input in the page cache and its time includes the flush to disk.",
            "Peak memory is resident memory at its highest, memory-mapped pages counted. 1 GB is 1e9 bytes.",
        ],
        rows=[measurements.row(name) for name, measurements in rivals.items()],
        bars=bars if shape == "1b" else (),
    )


def main() -> None:
    """Parse the command line, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", help="a recipe's name, 1b or tiny")
    parser.add_argument("--rounds", type=int, help="default: 3 for 1b and tiny, else 1")
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--reports", type=Path, default=REPORTS)
    arguments = parser.parse_args()
    small = arguments.shape in SMALL_SHAPES
    measure = measure_small if small else measure_large
    rounds = arguments.rounds or (3 if small else 1)
    measure(arguments.shape, arguments.work, rounds, busy_percent()).write(arguments.reports)


if __name__ == "__main__":
    main()
