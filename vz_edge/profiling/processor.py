"""Measure this processor: the three figures that decide how fast a bundle runs on it.

==============================  ====================================================================================
``fp32_flops_per_sec``          a product of 384 rows in fp32, as in the vision tower
``int4_flops_per_sec``          the same with 4-bit weights (MatMulNBits), as in prefill
``bandwidth_bytes_per_sec``     weights read a second by 4-bit products of one row, as in decoding
==============================  ====================================================================================

The weights of the third are more than the caches hold. Products have the sizes of a decoder with 1e9 weights. Medians;
what else runs on the machine disturbs them, so ``busy_percent`` is kept with them.

Nothing is needed but numpy and onnxruntime: the models are written by ``vz_edge.device.onnx_model``.
"""

from __future__ import annotations

import datetime
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vz_edge.device.machine import meminfo_bytes, memory_limit_bytes
from vz_edge.device.onnx_model import Node, StoredTensor, matmul_nbits, model_bytes
from vz_edge.device.runtime import CPU, import_onnxruntime, open_session
from vz_edge.profiling.environment import busy_percent, environment
from vz_edge.profiling.processes import SETTLE_SEC

ROWS, OUT_FEATURES, IN_FEATURES = 384, 11008, 2048
HIDDEN, INTERMEDIATE = 2048, 5632  # of the products of one row
DATA_FILE = "reading.data"
BLOCK = 128
ROUNDS, PRODUCTS = 5, 4
LEAST_BYTES, CACHES = 256_000_000, 2  # the weights of the products of one row, and that in units of the last cache
MEMORY_SHARE = 8  # at most an eighth of what is free: a session holds them twice
SYSTEM_BYTES = 1_500_000_000  # what a system without a desktop uses


@dataclass(frozen=True)
class ProcessorSpeed:
    """Medians, and how they were measured."""

    fp32_flops_per_sec: float
    int4_flops_per_sec: float
    bandwidth_bytes_per_sec: float
    threads: int
    busy_percent: float
    bandwidth_of: str


def measure_processor(threads: int, rounds: int = ROUNDS) -> ProcessorSpeed:
    """Measure for about ten seconds on ``threads`` threads. Raises DependencyError without onnxruntime."""
    busy = busy_percent()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {**products(folder, threads), "bandwidth": reading(folder, threads, bytes_to_read())}
        medians = measure_in_turn(runs, rounds)
    return ProcessorSpeed(
        fp32_flops_per_sec=medians["fp32"],
        int4_flops_per_sec=medians["int4"],
        bandwidth_bytes_per_sec=medians["bandwidth"],
        threads=threads,
        busy_percent=busy,
        bandwidth_of=f"weights read by the products of one row of decoder layers at 4 bits, {HIDDEN} wide",
    )


def measure_in_turn(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each of ``runs`` returns, in interleaved rounds after one that warms up."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            time.sleep(SETTLE_SEC)
            value = run()
            if number:
                samples[name].append(value)
    return {name: statistics.median(values) for name, values in samples.items()}


def products(folder: Path, threads: int) -> dict[str, Callable[[], float]]:
    """Functions that multiply ``ROWS`` rows some times and return FLOP/s: ``fp32`` and ``int4``."""
    rng, shape = np.random.default_rng(0), (OUT_FEATURES, IN_FEATURES)
    matrix = rng.standard_normal(shape[::-1], dtype=np.float32) * np.float32(0.02)
    models = {
        "fp32": model_bytes([Node("MatMul", ("x", "w"), "y")], {"w": matrix}, "float32", shape[::-1]),
        "int4": model_bytes([matmul_nbits("x", "w", "y", shape, BLOCK)], quantised(shape), "float32", shape[::-1]),
    }
    flops = 2 * PRODUCTS * ROWS * OUT_FEATURES * IN_FEATURES
    runs = {}
    for name, model in models.items():
        path = folder / f"{name}.onnx"
        path.write_bytes(model)
        runs[name] = _timed(path, threads, ROWS, shape[::-1], PRODUCTS, flops)
    return runs


def reading(folder: Path, threads: int, weight_bytes: int) -> Callable[[], float]:
    """A function that sends one row through about ``weight_bytes`` of 4-bit weights and returns bytes per second."""
    # Two layers: four products of attention each, and gate, up and down.
    shapes = [(HIDDEN, HIDDEN)] * 8 + [(INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)] * 3
    weights = {shape: quantised(shape) for shape in set(shapes)}
    layers_bytes = sum(array.nbytes for shape in shapes for array in weights[shape].values())
    count = max(1, round(weight_bytes / layers_bytes))
    nodes: list[Node] = []
    tensors: dict[str, StoredTensor] = {}
    with (folder / DATA_FILE).open("wb") as file:
        for number, shape in enumerate(shapes * count):
            for name, array in weights[shape].items():  # the same numbers each time, in memory of their own
                place = StoredTensor(array.shape, array.dtype.name, DATA_FILE, file.tell(), array.nbytes)
                tensors[f"{number}.{name}"] = place
                file.write(array.tobytes())
            x = f"{number - 1}.y" if number else "x"
            y = f"{number}.y" if number < len(shapes) * count - 1 else "y"
            nodes.append(matmul_nbits(x, f"{number}.w", y, shape, BLOCK))
    path = folder / "reading.onnx"
    path.write_bytes(model_bytes(nodes, tensors, "float32", (HIDDEN, HIDDEN)))
    return _timed(path, threads, 1, (HIDDEN, HIDDEN), PRODUCTS, PRODUCTS * count * layers_bytes)


def device_profile(name: str, speed: ProcessorSpeed) -> dict[str, Any]:
    """The profile of this machine's processor, as ``vz_edge.planning.devices`` reads it."""
    machine = environment()
    memory, limit = meminfo_bytes().get("MemTotal", 0), memory_limit_bytes()
    source = "measured: MemTotal of /proc/meminfo"
    if limit is not None and limit < memory:
        memory, source = limit, "measured: the memory limit of the control group"
    how = f"measured {datetime.date.today()}, {speed.threads} threads, onnxruntime "
    how += f"{import_onnxruntime().__version__}, {speed.busy_percent:g} % of the processors busy before: "
    left = max(memory - SYSTEM_BYTES, memory // 2)
    rule = "memory - 1.5 GB for a bare system" if left == memory - SYSTEM_BYTES else "half of the memory"
    return {
        "name": name,
        "title": f"{machine.cores} cores, {machine.cpu}",
        "device_class": "cpu",
        "unified_memory": True,
        "memory_bytes": {"value": memory, "source": source},
        "app_memory_bytes": {"value": left, "source": f"derived: {rule}"},
        "bandwidth_bytes_per_sec": _figure(speed.bandwidth_bytes_per_sec, how + speed.bandwidth_of),
        "peaks_flops_per_sec": {
            "fp32": _figure(speed.fp32_flops_per_sec, f"{how}fp32 product of {ROWS} rows"),
            "int8": _figure(
                speed.int4_flops_per_sec,
                f"{how}MatMulNBits of {ROWS} rows, 4 bits in blocks of {BLOCK}, accuracy_level 4",
            ),
        },
    }


def _figure(value: float, source: str) -> dict[str, Any]:
    return {"value": float(f"{value:.3g}"), "source": source}


def quantised(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Random 4-bit weights that keep the size of what they multiply: [out, blocks, block / 2] and what goes with it."""
    rng, (rows, columns) = np.random.default_rng(0), shape
    blocks = columns // BLOCK
    return {
        "w.packed": rng.integers(0, 256, (rows, blocks, BLOCK // 2), dtype=np.uint8),
        "w.scales": np.full((rows, blocks), 1 / (4.6 * columns**0.5), np.float32),  # 4.6: the deviation of 0..15
        "w.zero_points": np.full((rows, blocks // 2), 0x88, np.uint8),
    }


def _timed(path: Path, threads: int, rows: int, widths: tuple[int, int], runs: int, work: float) -> Callable[[], float]:
    """A function that runs the model ``runs`` times and returns ``work`` per second."""
    ort_value = import_onnxruntime().OrtValue
    session = open_session(path, [CPU], threads)
    # Into memory that is there, as inside a graph: pages that are touched for the first time would cost a third more.
    x_value = ort_value.ortvalue_from_shape_and_type((rows, widths[0]), np.float32)
    y_value = ort_value.ortvalue_from_shape_and_type((rows, widths[1]), np.float32)
    x_value.update_inplace(np.random.default_rng(0).standard_normal((rows, widths[0]), dtype=np.float32))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x_value)
    binding.bind_ortvalue_output("y", y_value)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(runs):
            session.run_with_iobinding(binding)
        return work / (time.perf_counter() - start)

    return run


def bytes_to_read() -> int:
    """What the products of one row read: more than the last cache holds, and not more than memory allows."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    cache = max((cache_bytes(path.read_text(encoding="ascii")) for path in sizes), default=0)
    free = meminfo_bytes().get("MemAvailable", MEMORY_SHARE * LEAST_BYTES)
    limit = memory_limit_bytes()
    return min(max(LEAST_BYTES, CACHES * cache), (free if limit is None else min(free, limit)) // MEMORY_SHARE)


def cache_bytes(text: str) -> int:
    """A size as sysfs writes it, such as "32768K"."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    text = text.strip()
    number, unit = (text[:-1], units[text[-1]]) if text and text[-1] in units else (text, 1)
    return int(number) * unit if number.isdigit() else 0
