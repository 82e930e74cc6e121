"""Measure this processor and write its device profile.

    python -m benchmarks.cpu_profile                       # profiles/cpu.yaml
    python -m benchmarks.cpu_profile --out my-board.yaml

Three figures decide how fast a bundle runs on a processor: how fast it multiplies in fp32 (the vision tower), how
fast 4-bit weights are multiplied (prefill), and at which rate weights and KV cache are read while a token is written
(decoding; it is below what the memory bus could). The first two are one layer of a 1B on 384 rows, the third is the
decoder of a 1B. Medians; run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
import yaml
from onnxruntime import OrtValue

from benchmarks import bundles
from vz_edge.bundle import read_manifest
from vz_edge.device.runtime import CPU, open_session, physical_cores
from vz_edge.host.graph import GraphBuilder
from vz_edge.host.quant import QuantConfig
from vz_edge.host.weight import ALL_ROWS, Weight
from vz_edge.planning.cost import decode_work
from vz_edge.planning.memory import ACTIVATION_BYTES, bundle_bytes
from vz_edge.profiling.environment import busy_percent, environment
from vz_edge.profiling.processes import SETTLE_SEC, interleave, workers

ROWS, OUT_FEATURES, IN_FEATURES = 384, 11008, 2048
PRODUCTS, PROCESSES = 10, 4
PROMPT_TOKENS, ANSWER_TOKENS = 384, 48
SYSTEM_BYTES = 1_500_000_000  # what a system without a desktop uses


def product(quant: QuantConfig | None, folder: Path, threads: int) -> Callable[[], float]:
    """A function that multiplies some times and returns FLOP/s."""
    values = torch.randn(OUT_FEATURES, IN_FEATURES, generator=torch.Generator().manual_seed(0)) * 0.02
    weight = Weight("layer.weight", (OUT_FEATURES, IN_FEATURES), lambda rows=ALL_ROWS: values[rows])
    graph = GraphBuilder("linear", ir.DataType.FLOAT)
    x = graph.input("x", ir.DataType.FLOAT, ["n", IN_FEATURES])
    graph.output(graph.linear(x, weight, None, quant), "y", ir.DataType.FLOAT, ["n", OUT_FEATURES])
    path = folder / f"{quant.bits if quant else 32}.onnx"
    graph.save(path, lambda *_: None)
    session = open_session(path, [CPU], threads)
    # Into memory that is there, as inside a graph: pages that are touched for the first time would cost a third more.
    x_value = OrtValue.ortvalue_from_shape_and_type((ROWS, IN_FEATURES), np.float32)
    y_value = OrtValue.ortvalue_from_shape_and_type((ROWS, OUT_FEATURES), np.float32)
    x_value.update_inplace(np.random.default_rng(0).standard_normal((ROWS, IN_FEATURES), dtype=np.float32))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x_value)
    binding.bind_ortvalue_output("y", y_value)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(PRODUCTS):
            session.run_with_iobinding(binding)
        return 2 * PRODUCTS * ROWS * OUT_FEATURES * IN_FEATURES / (time.perf_counter() - start)

    return run


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


def measure(rounds: int, threads: int, work: Path) -> dict[str, float]:
    """Medians: ``fp32`` and ``int4`` in FLOP/s, ``bandwidth`` in bytes/s."""
    bundle = bundles.bundle("1b", "cpu", work)
    manifest = read_manifest(bundle)
    parts = bundle_bytes(manifest.model, manifest.weights, "cpu")
    weight_bytes, context = parts["decoder"] + parts["lm_head"], PROMPT_TOKENS + ANSWER_TOKENS / 2
    token = decode_work(manifest.model.decoder, context, weight_bytes, ACTIVATION_BYTES["cpu"])
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "fp32": product(None, Path(folder), threads),
            "int4": product(QuantConfig(4), Path(folder), threads),
        }
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds + 1):
            for name, run in runs.items():
                time.sleep(SETTLE_SEC)
                value = run()
                if number:  # the first round warms up
                    samples[name].append(value)
    samples["bandwidth"] = [token.bytes_moved * ANSWER_TOKENS / sec for sec in decoding_sec(bundle, threads)]
    for name, values in samples.items():
        print(f"{name}: {statistics.median(values) / 1e9:.1f} G ({min(values) / 1e9:.1f} to {max(values) / 1e9:.1f})")
    return {name: statistics.median(values) for name, values in samples.items()}


def profile(name: str, measured: dict[str, float], threads: int, busy: float) -> dict:
    """The device profile of this machine."""
    machine = environment()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    how = f"measured {datetime.date.today()}, {threads} threads, onnxruntime {machine.versions.get('onnxruntime')}, "
    how += f"{busy:g} % of the processors busy before: "

    def figure(value: float, source: str) -> dict:
        return {"value": value, "source": source}

    def rounded(value: float) -> float:
        return float(f"{value:.3g}")

    return {
        "name": name,
        "title": f"{machine.cores} cores, {machine.cpu}",
        "device_class": "cpu",
        "unified_memory": True,
        "memory_bytes": figure(memory_bytes, "measured: sysconf"),
        "app_memory_bytes": figure(memory_bytes - SYSTEM_BYTES, "derived: memory - 1.5 GB for a bare system"),
        "bandwidth_bytes_per_sec": figure(
            rounded(measured["bandwidth"]),
            f"{how}weights and KV cache read while a 0.94 B decoder at 4 bits writes {ANSWER_TOKENS} tokens after "
            f"{PROMPT_TOKENS}",
        ),
        "peaks_flops_per_sec": {
            "fp32": figure(rounded(measured["fp32"]), f"{how}fp32 product of {ROWS} rows"),
            "int8": figure(
                rounded(measured["int4"]),
                f"{how}MatMulNBits of {ROWS} rows, 4 bits in blocks of 128, accuracy_level 4",
            ),
        },
    }


def main() -> None:
    """Measure and write the profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--out", type=Path, default=Path("profiles/cpu.yaml"))
    arguments = parser.parse_args()
    busy = busy_percent()
    data = profile(
        arguments.out.stem, measure(arguments.rounds, arguments.threads, arguments.work), arguments.threads, busy
    )
    text = "# Written by python -m benchmarks.cpu_profile, which measures the machine it runs on.\n"
    text += yaml.safe_dump(data, sort_keys=False, width=110, allow_unicode=True)
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
