"""One way to store or run a decoder, measured in a process of its own: the rows of the stage "blocks".

    python -m benchmarks.gpu.variant VARIANT SETTINGS

prints one line of JSON. VARIANT is a Variant in JSON. The graph is the exporter's, with random weights.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from benchmarks.gpu.bare_decoder import BareDecoder
from benchmarks.gpu.card_memory import CardMeter
from benchmarks.gpu.random_bundle import NoCheckpoint, save_random
from benchmarks.gpu.stage import Settings
from benchmarks.make_checkpoint import model_of_shape
from vz_edge.bundle import default_weights
from vz_edge.device.process import one_line
from vz_edge.device.runtime import CUDA, import_onnxruntime, preload_cuda, provider_options, session_options
from vz_edge.host.decoder_graph import DecoderQuant, build_decoder
from vz_edge.host.export import PRECISION
from vz_edge.host.graph import GraphBuilder
from vz_edge.host.quant import quant_config

PROMPT_TOKENS, STEPS, PREFILLS = 390, 32, 3
FPA_INTB = "ep.cuda.fpa_intb_gemm"  # since ONNX Runtime's pull 29622; before it the variable ORT_FPA_INTB_GEMM


@dataclass(frozen=True)
class Variant:
    """A way to store and run it.

    ``zero_points``: blocks have them; without, their range is symmetric. ``fused``: ONNX Runtime's products of 16-bit
    activations and packed weights, which its wheels have for blocks of 32 without zero points (pull 32324).
    ``own_options``: the device side's options of provider and session, not ONNX Runtime's own.
    """

    name: str
    bits: Literal[4, 8] = 4
    block_size: int = 128
    zero_points: bool = True
    fused: bool = False
    bfloat16: bool = False
    own_options: bool = True


def measure(variant: Variant, settings: Settings) -> dict[str, Any]:
    """Seconds and bytes; ``graph_step_sec`` or ``graph_failure``."""
    meter = CardMeter()
    meter.begin_stage()
    start = meter.end_stage()
    path = Path(settings.work) / f"variant-{settings.shape}-{variant.name.replace(' ', '-')}" / "decoder.onnx"
    weight_bytes = write(variant, settings, path)
    started = time.perf_counter()
    meter.begin_stage()
    decoder = BareDecoder(_session(variant, settings, path), PROMPT_TOKENS + STEPS)
    found: dict[str, Any] = {
        "weight_bytes": weight_bytes,
        "load_sec": time.perf_counter() - started,
        "memory": {"start": start, "load": meter.end_stage()},
    }
    meter.begin_stage()
    decoder.prefill_sec(PROMPT_TOKENS)
    found["memory"]["prefill"] = meter.end_stage()
    found["prefill_sec"] = statistics.median(decoder.prefill_sec(PROMPT_TOKENS) for _ in range(PREFILLS))
    decoder.steps_sec(PROMPT_TOKENS, 2)
    found["step_sec"] = statistics.median(decoder.steps_sec(PROMPT_TOKENS, STEPS))
    try:
        found["graph_step_sec"] = statistics.median(decoder.steps_sec(PROMPT_TOKENS, 1 + STEPS, graph=True)[1:])
    except Exception as error:  # the capture's own errors share no base class
        found["graph_failure"] = one_line(error)
    return found


def write(variant: Variant, settings: Settings, path: Path) -> int:
    """Write the graph and its random weights; their bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = replace(default_weights(variant.bits), block_size=variant.block_size, quantizer="rtn")
    linear, head = (quant_config(bits, weights) for bits in (weights.bits, weights.lm_head_bits))
    spec = model_of_shape(settings.large).decoder
    graph = build_decoder(NoCheckpoint(), spec, PRECISION["cuda"], DecoderQuant(linear, head))  # type: ignore[arg-type]
    if not variant.zero_points:
        without_zero_points(graph)
    weight_bytes = save_random(graph, path)
    if variant.bfloat16:
        to_bfloat16(path)
    return weight_bytes


def without_zero_points(graph: GraphBuilder) -> None:
    """Take the zero points off every MatMulNBits: blocks are then symmetric around the middle."""
    for node in graph.graph.all_nodes():
        if node.op_type == "MatMulNBits" and node.inputs[3] is not None:
            zero_points = node.inputs[3]
            node.replace_input_with(3, None)
            del graph.graph.initializers[zero_points.name]


def to_bfloat16(path: Path) -> None:
    """Make all of a float16 graph bfloat16. Weights keep their bytes: other numbers, as random."""
    model = ir.load(path)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == ir.DataType.FLOAT16:
            value.dtype = ir.DataType.BFLOAT16
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT16:
            continue
        if isinstance(tensor, ir.ExternalTensor):
            place = (tensor.location, tensor.offset, tensor.length)
            value.const_value = ir.ExternalTensor(*place, ir.DataType.BFLOAT16, shape=tensor.shape, name=name)
        else:
            numbers = tensor.numpy().astype(ir.DataType.BFLOAT16.numpy())
            value.const_value = ir.tensor(numbers, dtype=ir.DataType.BFLOAT16, name=name)
        value.dtype = ir.DataType.BFLOAT16
    ir.save(model, path)


def _session(variant: Variant, settings: Settings, path: Path) -> Any:
    ort, providers = import_onnxruntime(), list(settings.providers)
    if providers[0] == CUDA:
        preload_cuda(ort)
    options = session_options(providers, threads=None) if variant.own_options else ort.SessionOptions()
    if variant.fused:
        options.add_session_config_entry(FPA_INTB, "1")
    ours = provider_options(providers, cuda_graph=True)
    theirs = [{"enable_cuda_graph": "1"} if name == CUDA else {} for name in providers]
    chosen = ours if variant.own_options else theirs
    return ort.InferenceSession(path, options, providers=providers, provider_options=chosen)


def main() -> None:
    """Print what was found."""
    variant, settings = Variant(**json.loads(sys.argv[1])), Settings(**json.loads(sys.argv[2]))
    print(json.dumps(measure(variant, settings)))


if __name__ == "__main__":
    main()
