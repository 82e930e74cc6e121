"""Stage "versions": what is installed, what ``vz-edge doctor`` says, and the two operators that all depends on.

One MatMulNBits per number of bits and block size, with few rows and with many, and one GroupQueryAttention that reads a
prompt and then a token, each alone in a graph of the exporter's builder, against numpy in float64.
"""

from __future__ import annotations

import io
from itertools import product
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.gpu.stage import Record, Settings
from vz_edge.device.doctor import diagnose
from vz_edge.device.nvml import missing
from vz_edge.device.process import command_output, one_line
from vz_edge.device.runtime import CUDA, import_onnxruntime, preload_cuda, provider_options, session_options
from vz_edge.errors import ProviderError
from vz_edge.host.graph import MICROSOFT, GraphBuilder
from vz_edge.host.quant import QuantConfig, quantize
from vz_edge.host.quant.pack import dequantize
from vz_edge.host.weight import Weight

INPUTS, OUTPUTS = 1024, 512
ROWS = (1, 40)  # a token, and a prompt: they take different kernels
HEADS, KV_HEADS, HEAD_DIM, CAPACITY, PROMPT = 4, 2, 128, 32, 9
# Of the result's norm. float16 holds 11 bits, and level 4 multiplies in int8 on a processor.
LARGEST_DISTANCE = 0.02


def run(settings: Settings, record: Record) -> None:
    """Look around, then compute."""
    ort = import_onnxruntime()
    driver = command_output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    record.measured("nvidia_smi", (driver or "").strip())
    record.measured("onnxruntime", {"version": ort.__version__, "build": one_line(ort.get_build_info())})
    if settings.device == "cuda" and (reason := missing()):
        record.note(f"NVML: {reason}")
    problems = 0
    for finding in diagnose():
        cells = {"check": finding.name, "state": finding.state, "found": one_line(finding.detail), "fix": finding.fix}
        record.row("vz-edge doctor", cells)
        problems += finding.state == "problem"
    distances = [_matmul(settings, record, bits, block) for bits, block in product((4, 8), (32, 64, 128))]
    distances.append(_attention(settings, record))
    wrong = sum(distance is None or not distance <= LARGEST_DISTANCE for distance in distances)
    record.line(
        f"{(driver or 'no GPU').splitlines()[0]}; onnxruntime {ort.__version__}; doctor: {problems} problems; "
        f"{len(distances) - wrong} of {len(distances)} operators within {LARGEST_DISTANCE:.0%} of numpy"
    )
    if wrong:
        raise ProviderError(f"{wrong} of {len(distances)} operators do not run, or compute something else than numpy")


def _matmul(settings: Settings, record: Record, bits: Literal[4, 8], block: int) -> float | None:
    numbers = torch.from_numpy(np.random.default_rng(bits + block).standard_normal((OUTPUTS, INPUTS), np.float32))
    weight = Weight("weight", (OUTPUTS, INPUTS), lambda rows=slice(None): numbers[rows])
    quant = QuantConfig(bits, block)
    packed = quantize(weight, quant)
    scales = packed.scales.half() if settings.device == "cuda" else packed.scales
    exact = dequantize(packed.packed, scales, packed.zero_points, bits, INPUTS).double().numpy()

    def build(graph: GraphBuilder) -> None:
        x = graph.input("x", graph.precision, ["rows", INPUTS])
        graph.output(graph.linear(x, weight, None, quant), "y", graph.precision, ["rows", OUTPUTS])

    worst = 0.0
    cells = {"operator": f"MatMulNBits, {bits} bits, blocks of {block}"}
    try:
        session = _session(settings, build)
        for rows in ROWS:
            x = np.random.default_rng(rows).standard_normal((rows, INPUTS)).astype(_dtype(settings))
            (y,) = session.run(None, {"x": x})
            worst = max(worst, _distance(y, x.astype(np.float64) @ exact.T))
    except Exception as error:  # onnxruntime's exceptions share no base class
        record.row("operators against numpy", cells | {"failed": one_line(error)})
        return None
    record.row("operators against numpy", cells | {"distance": f"{worst:.1e}"})
    return worst


def _attention(settings: Settings, record: Record) -> float | None:
    dtype = _dtype(settings)
    rng = np.random.default_rng(0)
    packed = rng.standard_normal((1, PROMPT + 1, (HEADS + 2 * KV_HEADS) * HEAD_DIM)).astype(dtype)
    angles = np.arange(CAPACITY)[:, None] * 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    tables = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    cells = {"operator": f"GroupQueryAttention, {HEADS} heads on {KV_HEADS}, a prompt of {PROMPT} and a token"}
    try:
        session = _session(settings, lambda graph: _attention_graph(graph, tables))
        caches = _caches(settings, dtype)
        found = [_attend(session, caches, packed[:, :PROMPT], PROMPT, settings)]
        found.append(_attend(session, caches, packed[:, PROMPT:], PROMPT + 1, settings))
        distance = _distance(np.concatenate(found, axis=1)[0], _reference_attention(packed[0], *tables))
    except Exception as error:
        record.row("operators against numpy", cells | {"failed": one_line(error)})
        return None
    record.row("operators against numpy", cells | {"distance": f"{distance:.1e}"})
    return distance


def _attention_graph(graph: GraphBuilder, tables: tuple[np.ndarray, np.ndarray]) -> None:
    cache = (1, KV_HEADS, "past", HEAD_DIM)
    packed = graph.input("packed", graph.precision, [1, "n", (HEADS + 2 * KV_HEADS) * HEAD_DIM])
    past = [graph.input(name, graph.precision, cache) for name in ("past_key", "past_value")]
    lengths = graph.input("lengths", ir.DataType.INT32, [1, 1])
    total = graph.input("total", ir.DataType.INT32, [])
    cosines, sines = (graph.constant(table, name) for table, name in zip(tables, ("cos", "sin"), strict=True))
    inputs = (packed, None, None, *past, lengths, total, cosines, sines)
    settings = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": 1}
    attended, *present = graph.multi_op("GroupQueryAttention", *inputs, outputs=3, domain=MICROSOFT, **settings)
    graph.output(attended, "attended", graph.precision, [1, "n", HEADS * HEAD_DIM])
    for value, name in zip(present, ("present_key", "present_value"), strict=True):
        graph.output(value, name, graph.precision, (1, KV_HEADS, "total", HEAD_DIM))


def _caches(settings: Settings, dtype: np.dtype) -> list[Any]:
    from onnxruntime import OrtValue

    shape = (1, KV_HEADS, CAPACITY, HEAD_DIM)
    return [OrtValue.ortvalue_from_shape_and_type(shape, dtype, settings.device, 0) for _ in range(2)]


def _attend(session: Any, caches: list[Any], packed: np.ndarray, total: int, settings: Settings) -> np.ndarray:
    """Attention in place, as the decoder runs it: a buffer is a past and its present."""
    binding = session.io_binding()
    binding.bind_output("attended", settings.device)
    for cache, part in zip(caches, ("key", "value"), strict=True):
        binding.bind_ortvalue_input(f"past_{part}", cache)
        binding.bind_ortvalue_output(f"present_{part}", cache)
    binding.bind_cpu_input("packed", np.ascontiguousarray(packed))
    binding.bind_cpu_input("lengths", np.array([[total - 1]], np.int32))
    binding.bind_cpu_input("total", np.array(total, np.int32))
    session.run_with_iobinding(binding)
    attended: np.ndarray = binding.copy_outputs_to_cpu()[0]
    return attended


def _reference_attention(packed: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    """Causal attention with rotated queries and keys, [n, heads * head_dim], in float64."""
    n = len(packed)
    heads = packed.astype(np.float64).reshape(n, HEADS + 2 * KV_HEADS, HEAD_DIM).transpose(1, 0, 2)
    cos, sin = cosines[:n].astype(np.float64), sines[:n].astype(np.float64)

    def rotated(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    query, key, value = rotated(heads[:HEADS]), rotated(heads[HEADS:-KV_HEADS]), heads[-KV_HEADS:]
    key, value = (np.repeat(x, HEADS // KV_HEADS, axis=0) for x in (key, value))
    scores = query @ key.transpose(0, 2, 1) / np.sqrt(HEAD_DIM)
    scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ value).transpose(1, 0, 2).reshape(n, -1)


def _session(settings: Settings, build: Any) -> Any:
    """A session of the graph that ``build`` makes; on CUDA nothing of it may fall back to the processor."""
    ort = import_onnxruntime()
    graph = GraphBuilder("operator", ir.DataType.FLOAT16 if settings.device == "cuda" else ir.DataType.FLOAT)
    build(graph)
    file = io.BytesIO()
    file.write(ir.to_proto(_with_weights(graph)).SerializeToString())
    providers = list(settings.providers)
    if providers[0] == CUDA:
        preload_cuda(ort)
    options = session_options(providers, threads=None)
    session = ort.InferenceSession(
        file.getvalue(), options, providers=providers, provider_options=provider_options(providers)
    )
    if providers[0] not in session.get_providers():
        raise ProviderError(f"{providers[0]} did not start; started: {', '.join(session.get_providers())}")
    return session


def _with_weights(graph: GraphBuilder) -> ir.Model:
    """The model with every weight in it, none in a file beside it."""
    for value in graph.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    return graph.model()


def _dtype(settings: Settings) -> np.dtype:
    return np.dtype(np.float16 if settings.device == "cuda" else np.float32)


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))
