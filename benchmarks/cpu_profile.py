"""Measure this processor and write its device profile.

    python -m benchmarks.cpu_profile                       # profiles/cpu.yaml
    python -m benchmarks.cpu_profile --out my-board.yaml

As ``vz-edge doctor --measure``, which needs nothing but onnxruntime, but for decoding: here the rate at which weights
and KV cache are read is that of a whole 1B decoder, exported for it, in several processes. Run it on an otherwise idle
machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks import bundles
from vz_edge.bundle import read_manifest
from vz_edge.device.runtime import physical_cores
from vz_edge.planning.cost import decode_work
from vz_edge.planning.memory import ACTIVATION_BYTES, bundle_bytes
from vz_edge.profiling.environment import busy_percent
from vz_edge.profiling.processes import interleave, workers
from vz_edge.profiling.processor import ProcessorSpeed, device_profile, measure_in_turn, products

PROCESSES = 4
PROMPT_TOKENS, ANSWER_TOKENS = 384, 48


def decoding_sec(bundle: Path, threads: int) -> list[float]:
    """Seconds in which the bundle's decoder writes ``ANSWER_TOKENS``, in several processes, twice in each.

    Where a process's weights happen to lie in memory moves its rate by a tenth for as long as it lives.
    """
    options = ["--threads", str(threads), "--bundle", str(bundle), "--worker", "ours"]
    command = [sys.executable, "-m", "benchmarks.decoder_speed", *options]
    request = {"prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS}
    seconds = []
    for _ in range(PROCESSES):
        with workers({"ours": command}, threads) as rivals:
            seconds += [answer["decode_sec"] for answer in interleave(rivals, request, 2)["ours"]]
    return seconds


def measure(rounds: int, threads: int, work: Path, busy: float) -> ProcessorSpeed:
    """As ``vz_edge.profiling.processor`` measures, but decoding with the decoder of a whole bundle."""
    bundle = bundles.bundle("1b", "cpu", work)
    manifest = read_manifest(bundle)
    parts = bundle_bytes(manifest.model, manifest.weights, "cpu")
    weight_bytes, context = parts["decoder"] + parts["lm_head"], PROMPT_TOKENS + ANSWER_TOKENS / 2
    token = decode_work(manifest.model.decoder, context, weight_bytes, ACTIVATION_BYTES["cpu"])
    bandwidths = [token.bytes_moved * ANSWER_TOKENS / sec for sec in decoding_sec(bundle, threads)]
    with tempfile.TemporaryDirectory() as folder:
        medians = measure_in_turn(products(Path(folder), threads), rounds)
    return ProcessorSpeed(
        fp32_flops_per_sec=medians["fp32"],
        int4_flops_per_sec=medians["int4"],
        bandwidth_bytes_per_sec=statistics.median(bandwidths),
        threads=threads,
        busy_percent=busy,
        bandwidth_of=f"weights and KV cache read while a 0.94 B decoder at 4 bits writes {ANSWER_TOKENS} tokens after "
        f"{PROMPT_TOKENS}",
    )


def main() -> None:
    """Measure and write the profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--out", type=Path, default=Path("profiles/cpu.yaml"))
    arguments = parser.parse_args()
    speed = measure(arguments.rounds, arguments.threads, arguments.work, busy_percent())
    data = device_profile(arguments.out.stem, speed)
    text = "# Written by python -m benchmarks.cpu_profile, which measures the machine it runs on.\n"
    text += yaml.safe_dump(data, sort_keys=False, width=110, allow_unicode=True)
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
