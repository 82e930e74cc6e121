"""Stage "operators": where a prefill and 32 tokens of the 13B at 4 bits spend their time, by operator.

ONNX Runtime's own profile takes the time of each operator on the host. Kernels of a card run later than they are
launched; so that an operator's time holds its kernels', each launch waits for its kernel here (CUDA_LAUNCH_BLOCKING,
CUDA's documentation), which adds some microseconds to each. What a card could do at best is told beside the operators
whose work is known: weights and cache through its memory, or products on its tensor cores, whichever takes longer.

Kernels by name, without that waiting, come from CUPTI by way of torch's profiler, where there is one (kernels.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.rivals import LARGE, make
from benchmarks.gpu.stage import Record, Settings
from benchmarks.gpu.stages.headline import this_card
from vz_edge.device.process import one_line
from vz_edge.device.runtime import CUDA, import_onnxruntime, preload_cuda, provider_options, session_options
from vz_edge.planning.cost import decode_work, prefill_work
from vz_edge.planning.devices import DeviceProfile
from vz_edge.planning.memory import ACTIVATION_BYTES, bundle_bytes

PROMPT_TOKENS = 390  # 320 of a picture, and a question
STEPS = 32
HEAVIEST = 5
KERNELS_TIMEOUT_SEC = 60.0
PRODUCTS, ATTENTION = ("MatMulNBits", "MatMul"), ("GroupQueryAttention",)


def run(settings: Settings, record: Record) -> None:
    """Profile, then ask CUPTI."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # before CUDA starts
    folder = make(LARGE, settings)
    events = profile(folder, settings)
    profiled = split(events)
    card = this_card()
    words = []
    for part, seconds in profiled.items():
        total_sec = sum(seconds.values())
        limits = limits_sec(part, settings, card) if card else {}
        heaviest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:HEAVIEST]
        for operator in heaviest:
            limit = limits.get(operator)
            cells = {"operator": operator, "time": f"{1e3 * seconds[operator]:.3g} ms"}
            cells["share"] = f"{seconds[operator] / total_sec:.1%}"
            if limits:
                cells["of the card's limit"] = f"{limit / seconds[operator]:.0%}" if limit else "–"
            record.row(title(part), cells)
        words.append(f"{part}: {heaviest[0]} {seconds[heaviest[0]] / total_sec:.0%}")
    record.measured("operator_sec", profiled)
    record.line("; ".join(words))
    _kernels(folder, settings, record)


def title(part: str) -> str:
    """Of a part's table."""
    tokens = f"a prefill of {PROMPT_TOKENS} tokens" if part == "prefill" else f"{STEPS} tokens"
    return f"{LARGE.name}, {tokens}, operators in ONNX Runtime's profile"


def profile(folder: Path, settings: Settings) -> list[dict[str, Any]]:
    """The events of a warm-up, a prefill and STEPS tokens, as ONNX Runtime writes them."""
    from benchmarks.gpu.bare_decoder import BareDecoder

    ort, providers = import_onnxruntime(), list(settings.providers)
    if providers[0] == CUDA:
        preload_cuda(ort)
    options = session_options(providers, threads=None)
    options.enable_profiling = True
    options.profile_file_prefix = str(folder.parent / "operators")
    session = ort.InferenceSession(
        folder / "decoder.onnx", options, providers=providers, provider_options=provider_options(providers)
    )
    decoder = BareDecoder(session, PROMPT_TOKENS + STEPS)
    decoder.prefill_sec(PROMPT_TOKENS)
    decoder.steps_sec(PROMPT_TOKENS, 1)
    decoder.prefill_sec(PROMPT_TOKENS)
    decoder.steps_sec(PROMPT_TOKENS, STEPS)
    path = Path(session.end_profiling())
    events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return events


def split(events: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds by operator of the prefill and of the tokens after it; the first two runs warm up."""
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")
    parts = {"prefill": runs[2:3], "decode": runs[3:]}
    found: dict[str, dict[str, float]] = {part: defaultdict(float) for part in parts}
    for event in events:
        if event.get("cat") != "Node" or not event.get("name", "").endswith("_kernel_time"):
            continue
        for part, spans in parts.items():
            if any(start <= event["ts"] <= end for start, end in spans):
                found[part][event["args"]["op_name"]] += event["dur"] / 1e6
    return {part: dict(seconds) for part, seconds in found.items()}


def limits_sec(part: str, settings: Settings, card: DeviceProfile) -> dict[str, float]:
    """What the card needs at least for the products with weights and for attention in this part."""
    model, bandwidth, peak = LARGE.model(settings), card.bandwidth_bytes_per_sec.value, card.peak("fp16_fp32acc")
    parts = bundle_bytes(model, LARGE.weights, "cuda")
    weights, activation = parts["decoder"] + parts["lm_head"], ACTIVATION_BYTES["cuda"]
    if part == "prefill":
        work, times = prefill_work(model.decoder, PROMPT_TOKENS, weights, activation), 1
        cache = 0.0
    else:
        work, times = decode_work(model.decoder, PROMPT_TOKENS + STEPS / 2, weights, activation), STEPS
        cache = work.bytes_moved - weights
    products = max(work.linear_flops / peak, weights / bandwidth)
    attention = max(work.attention_flops / peak, cache / bandwidth)
    return dict.fromkeys(PRODUCTS, times * products) | dict.fromkeys(ATTENTION, times * attention)


def _kernels(folder: Path, settings: Settings, record: Record) -> None:
    """CUPTI's view, in a process that does not wait at each launch."""
    if settings.device != "cuda":
        record.note("Kernels by name are CUDA's: not asked for on a processor.")
        return
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", str(folder), json.dumps(asdict(settings))]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_LAUNCH_BLOCKING"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=KERNELS_TIMEOUT_SEC, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        reason = getattr(error, "stderr", "") or error
        record.note(f"No kernels by name: {one_line(str(reason)[-200:])}")
        return
    record.measured("kernel_sec", found)
    for part, seconds in found.items():
        total_sec = sum(seconds.values())
        for name in sorted(seconds, key=seconds.__getitem__, reverse=True)[:HEAVIEST]:
            share = f"{seconds[name] / total_sec:.1%}"
            cells = {"kernel": one_line(name)[:100], "time": f"{1e3 * seconds[name]:.3g} ms", "share": share}
            record.row(f"{LARGE.name}, {part}, kernels (CUPTI)", cells)
