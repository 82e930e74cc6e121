"""Published measurements of language models as data: what the time model is checked against.

Decoding and prefill at batch 1, each with where it was read. Formats: bits a weight of the linear layers and of
lm_head, scales and zero points counted. MLC q4f16_1 has groups of 32 with an fp16 scale; W4 of TinyChat and TensorRT
Edge-LLM groups of 128 with scale and zero point, and an fp16 lm_head; GGUF Q4_0 blocks of 32 and a Q6_K lm_head;
Q4_K_M has half of the value and down projections in Q6_K (6.5625 bits) and the rest in Q4_K (4.5).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vz_edge.planning.cost import decoder_params
from vz_edge.planning.roofline import Runtime, load_runtime, parse_runtime
from vz_edge.recipe import DecoderSpec

FORMATS = {
    "fp16": (16.0, 16.0),
    "q4f16": (4.5, 4.5),
    "w4": (4.25, 16.0),
    "Q4_0": (4.5, 6.5625),
    "Q4_K_M": (4.8, 6.5625),
}
BITS = {"fp16": 16}  # all others are 4

QWEN3 = (151936, 32768)  # vocabulary, context
MODELS = {
    "Llama-2-7B": DecoderSpec("llama", 4096, 11008, 32, 32, 32, 128, 32000, 4096),
    "Llama-2-13B": DecoderSpec("llama", 5120, 13824, 40, 40, 40, 128, 32000, 4096),
    "Llama-3-8B": DecoderSpec("llama", 4096, 14336, 32, 32, 8, 128, 128256, 8192),
    "Qwen3-8B": DecoderSpec("qwen2", 4096, 12288, 36, 32, 8, 128, *QWEN3),
    "Qwen3-4B": DecoderSpec("qwen2", 2560, 9728, 36, 32, 8, 128, *QWEN3),
    "Qwen3-1.7B": DecoderSpec("qwen2", 2048, 6144, 28, 16, 8, 128, *QWEN3),
}


class Decode(NamedTuple):
    """Tokens a second that a runtime writes."""

    device: str
    runtime: str
    format: str
    model: str
    tokens_per_sec: float
    source: str


class Prefill(NamedTuple):
    """Seconds that a runtime takes to read ``tokens`` tokens."""

    device: str
    runtime: str
    format: str
    model: str
    tokens: int
    sec: float
    source: str


MLC_JETSON = "dusty-nv/jetson-containers packages/llm/mlc/README.md"
TINYCHAT = "mit-han-lab/llm-awq tinychat/README.md"
EDGE = "TensorRT Edge-LLM documentation, v0.9"
HOLOHUB = "nvidia-holoscan/holohub pull 170 (IGX Orin: the GPU and memory of an AGX Orin)"
MLC_PERF = "mlc-ai/llm-perf-bench"
XIONGJIE = "XiongjieDai/GPU-Benchmarks-on-LLM-Inference"

DECODE = (
    Decode("agx-orin-64", "mlc", "q4f16", "Llama-2-7B", 46.9, MLC_JETSON),
    Decode("agx-orin-64", "mlc", "q4f16", "Llama-2-13B", 25.0, MLC_JETSON),
    Decode("agx-orin-64", "mlc", "q4f16", "Llama-3-8B", 40.0, MLC_JETSON),
    Decode("orin-nano-8", "mlc", "q4f16", "Llama-3-8B", 14.0, MLC_JETSON),
    Decode("orin-nano-8-super", "mlc", "q4f16", "Llama-3-8B", 19.1, MLC_JETSON),
    Decode("agx-orin-64", "tinychat", "w4", "Llama-2-7B", 32.5, TINYCHAT),
    Decode("agx-orin-64", "tinychat", "w4", "Llama-2-13B", 18.2, TINYCHAT),
    Decode("agx-orin-64", "transformers", "fp16", "Llama-2-7B", 11.8, TINYCHAT),
    Decode("agx-orin-64", "edge-llm", "w4", "Qwen3-8B", 32.5, EDGE),
    Decode("agx-orin-64", "edge-llm", "w4", "Qwen3-4B", 53.1, EDGE),
    Decode("agx-orin-64", "edge-llm", "w4", "Qwen3-1.7B", 98.6, EDGE),
    Decode("orin-nx-16", "edge-llm", "w4", "Qwen3-8B", 19.0, EDGE),
    Decode("orin-nx-16", "edge-llm", "w4", "Qwen3-4B", 31.6, EDGE),
    Decode("agx-orin-64", "llama.cpp", "Q4_0", "Llama-2-7B", 22.5, HOLOHUB),
    Decode("agx-orin-64", "llama.cpp", "Q4_0", "Llama-2-13B", 13.3, HOLOHUB),
    Decode("rtx-4090-24", "tinychat", "w4", "Llama-2-7B", 188.0, TINYCHAT),
    Decode("rtx-4090-24", "tinychat", "w4", "Llama-2-13B", 109.0, TINYCHAT),
    Decode("rtx-4090-24", "mlc", "q4f16", "Llama-2-7B", 204.8, MLC_PERF),
    Decode("rtx-4090-24", "mlc", "q4f16", "Llama-2-13B", 113.5, MLC_PERF),
    Decode("rtx-4090-24", "transformers", "fp16", "Llama-2-7B", 63.3, TINYCHAT),
    Decode("rtx-4090-24", "llama.cpp", "Q4_0", "Llama-2-7B", 149.0, XIONGJIE),
    Decode("rtx-4090-24", "llama.cpp", "Q4_K_M", "Llama-3-8B", 131.0, XIONGJIE),
    Decode("rtx-3080-10", "llama.cpp", "Q4_K_M", "Llama-3-8B", 110.0, XIONGJIE),
)

# Qwen3-VL-8B, 4B and 2B have the decoders of Qwen3-8B, 4B and 1.7B.
PREFILL = (
    Prefill("agx-orin-64", "edge-llm", "w4", "Qwen3-8B", 292, 0.225, EDGE),
    Prefill("agx-orin-64", "edge-llm", "w4", "Qwen3-4B", 292, 0.124, EDGE),
    Prefill("agx-orin-64", "edge-llm", "w4", "Qwen3-1.7B", 292, 0.050, EDGE),
    Prefill("agx-orin-64", "transformers", "fp16", "Llama-3-8B", 1056, 1.048, TINYCHAT),
    Prefill("rtx-4090-24", "transformers", "fp16", "Llama-3-8B", 1056, 0.162, TINYCHAT),
    Prefill("rtx-4090-24", "llama.cpp", "fp16", "Llama-2-7B", 512, 512 / 11048, "ggml-org/llama.cpp pull 4766"),
    Prefill("rtx-3080-10", "llama.cpp", "Q4_K_M", "Llama-3-8B", 512, 512 / 3729, XIONGJIE),
)

LEFT_OUT = {
    "Orin NX 16, Edge-LLM, Qwen3-VL-8B, 292 tokens in 462 ms": (
        "59 % of that module's peak where the same runtime reaches 43 % on AGX Orin: most likely its Super mode, which "
        "the source does not say and the profile is not"
    ),
    "NanoLLM on AGX Orin and Orin Nano, 1.43 / 0.85 / 0.55 pictures a second": (
        "one number for tower, prefill and answer, with neither prompt length nor the tower's runtime given"
    ),
    "13B prefill of the paper's table 18 (129 ms at 2880 tokens)": "faster than an A800's peak",
}

# Runtimes whose rows check the time model and that no plan is made for.
ONLY_CHECKED = {path.stem: path for path in sorted((Path(__file__).parent / "runtimes").glob("*.yaml"))}


def runtime_of(name: str) -> Runtime:
    """The runtime of a row."""
    return parse_runtime(ONLY_CHECKED[name]) if name in ONLY_CHECKED else load_runtime(name)


def weight_bytes(row: Decode | Prefill) -> int:
    """Bytes of all that is read to write a token."""
    decoder, (bits, head_bits) = MODELS[row.model], FORMATS[row.format]
    head = decoder.vocab_size * decoder.hidden_size
    return round((decoder_params(decoder) * bits + head * head_bits) / 8)


def bits(row: Decode | Prefill) -> int:
    """Bits a weight, as a runtime's figures are kept by."""
    return BITS.get(row.format, 4)
