"""What a model with given bits and budget needs on a device, before anything is downloaded, flashed or bought.

>>> recipe = load_recipe("llava-next-13b")
>>> prediction = predict(recipe.model, default_weights(4), 320, None, load_device("agx-orin-64"), "onnxruntime", 70, 32)
>>> prediction.memory.peak_bytes / 1e9, prediction.ttft_sec, prediction.tokens_per_sec
(8.87..., 1.11..., 16.4...)

How long loading takes is not predicted: it is the disk's matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vz_edge.bundle import WeightSpec
from vz_edge.errors import DeviceError
from vz_edge.planning.cost import (
    decode_work,
    prefill_work,
    preprocess_pixels,
    published_prefill_work,
    published_vision_work,
    unpacking_work,
    vision_work,
)
from vz_edge.planning.devices import DeviceProfile
from vz_edge.planning.memory import ACTIVATION_BYTES, bundle_bytes, has_bitsandbytes
from vz_edge.planning.question import Question, question_of
from vz_edge.planning.resident import (
    MemoryPlan,
    bitsandbytes_cpu_memory,
    bitsandbytes_gpu_memory,
    onnxruntime_cpu_memory,
    onnxruntime_gpu_memory,
    transformers_memory,
)
from vz_edge.planning.roofline import Efficiency, load_runtime, stage_sec, token_sec
from vz_edge.recipe import ModelSpec

RUNTIMES = ("onnxruntime", "transformers")


@dataclass(frozen=True)
class Prediction:
    """Memory by stage and part, and seconds by stage. Decoding is at the middle of the answer."""

    question: Question
    memory: MemoryPlan
    preprocess_sec: float
    vision_sec: float
    prefill_sec: float
    decode_sec_per_token: float

    @property
    def ttft_sec(self) -> float:
        """Seconds from the picture to the first token."""
        return self.preprocess_sec + self.vision_sec + self.prefill_sec

    @property
    def tokens_per_sec(self) -> float:
        """Tokens written a second."""
        return 1 / self.decode_sec_per_token

    @property
    def answer_sec(self) -> float:
        """Seconds from the picture to the last token; prefill gives the first one."""
        return self.ttft_sec + (self.question.answer_tokens - 1) * self.decode_sec_per_token


def predict(
    model: ModelSpec,
    weights: WeightSpec,
    tokens: int | None,
    tiles: int | None,
    device: DeviceProfile,
    runtime: str,
    prompt_tokens: int,
    answer_tokens: int,
    efficiency: Efficiency | None = None,
) -> Prediction:
    """Predict one picture, one prompt, one answer.

    ``tokens`` is the budget, a total at the model's largest tile count, or None for all tokens; ``tiles`` the
    picture's, None for the most; ``runtime`` "onnxruntime" (this package's bundles) or "transformers" (the paper's
    code); ``efficiency`` what it reaches there, by default what its file says. A bundle with bitsandbytes weights does
    the bundle's work at the speed of transformers, which runs it. Raises BudgetError, RequestError, or
    DeviceError where there are no figures for such a device.
    """
    if runtime not in RUNTIMES:
        raise DeviceError(f"no memory model for runtime '{runtime}'; there are: {', '.join(RUNTIMES)}")
    question = question_of(model, tokens, tiles, prompt_tokens, answer_tokens)
    known = load_runtime("transformers" if has_bitsandbytes(weights) else runtime)
    efficiency = efficiency or known.efficiency(device.device_class)
    target: Literal["cpu", "cuda"] = "cpu" if device.device_class == "cpu" else "cuda"
    memory = memory_plan(model, weights, question, device, runtime, selects=tokens is not None)
    # What is read to write a token; on a processor the bundle's bytes, which its bandwidth was measured with.
    read = bundle_bytes(model, weights, target) if target == "cpu" else memory.parts
    decoder_bytes, activation = read["decoder"] + read["lm_head"], ACTIVATION_BYTES[target]
    decoder, launches = model.decoder, known.launches.decoder[str(weights.bits)]
    if runtime == "transformers":
        vision_of, prefill_of = published_vision_work, published_prefill_work
    else:
        vision_of, prefill_of = vision_work, prefill_work
    look = vision_of(model, question, read["vision"], activation)
    prefill = prefill_of(decoder, question.prefill_tokens, decoder_bytes, activation)
    if weights.bits in efficiency.unpacked_bits:
        prefill = unpacking_work(prefill, decoder)
    decode = decode_work(decoder, question.prefill_tokens + question.answer_tokens / 2, decoder_bytes, activation)
    pixel_sec = efficiency.pixel_sec.value if efficiency.pixel_sec else 0.0
    return Prediction(
        question,
        memory,
        preprocess_pixels(model, question) * pixel_sec,
        stage_sec(look, weights.vision_bits, device, efficiency, known.launches.vision),
        stage_sec(prefill, weights.bits, device, efficiency, launches),
        token_sec(decode, weights.bits, device, efficiency, launches),
    )


def memory_plan(
    model: ModelSpec, weights: WeightSpec, question: Question, device: DeviceProfile, runtime: str, selects: bool
) -> MemoryPlan:
    """The memory alone. ``selects``: with VisionZip, not all tokens; ``runtime`` is one of RUNTIMES.

    "onnxruntime" stands for this package's bundles; those with bitsandbytes weights are told by their ``weights``.
    """
    if runtime == "transformers":
        return transformers_memory(model, weights, question, selects)
    if has_bitsandbytes(weights):
        if device.device_class == "cpu":
            return bitsandbytes_cpu_memory(model, weights, question)
        return bitsandbytes_gpu_memory(model, weights, question, device.unified_memory)
    if device.device_class == "cpu":
        return onnxruntime_cpu_memory(model, weights, question)
    return onnxruntime_gpu_memory(model, weights, question, device.unified_memory)
