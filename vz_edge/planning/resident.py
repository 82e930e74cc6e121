"""Memory of an answer by stage and part, in bytes: what a device must have while a model looks and writes.

Three backends. **ONNX Runtime** runs this package's bundles. On a GPU all weights stay there, but for the token
table, which the host maps. On a processor whose memory is short the tower's weights are mapped and given back after
each picture (``vz_edge/device/mapped.py``), so that the peak is the largest stage and not the sum: it is what is
needed, and with memory to spare more is taken. **bitsandbytes** is a bundle whose language model runs in
transformers; its plan has not been held against a large model's measurement yet.
**transformers** is the paper's own code: LLaVA 1.2 on transformers 4.37 with bitsandbytes, as evaluated on an A800.

The paper's memory table (arXiv 2412.04467, table 16: LLaVA-NeXT on ScienceQA, nvidia-smi's MiB) is explained by what
that code does; with 200 tokens of prompt the rows come out 5 % above to 5 % below:

* selection makes the eager tower return the attention of all its layers: 24 x 16 heads x 577 x 577 a tile, 1.2 GiB
  for five tiles. That, not the decoder, is the peak of the rows with 320 tokens;
* ``generate`` keeps the last step's cache while the next one is concatenated, and the float32 logits of all prompt
  positions with them: "2 * past_KV + first_iteration_logits" (huggingface/transformers pull 30536, which ended it);
* the caching allocator gives a tensor of 10 MiB or more a segment of its own, which a longer picture's tensors do not
  fit into and which is never given back. Which pictures came before is not published. **Assumed**: one picture of the
  smallest grid. Without it the 13B row with 2880 tokens is predicted 13.5 % too low, and is not explained; the
  others stay within 6 %. Rows with 320 tokens have no tensor of that size.
"""

from __future__ import annotations

from dataclasses import dataclass

from vz_edge.bundle import WeightSpec
from vz_edge.planning.memory import (
    ACTIVATION_BYTES,
    bitsandbytes_bytes,
    bundle_bytes,
    decoder_linear_shapes,
    embedding_rows,
    kv_cache_bytes_per_token,
    linear_bytes,
    vision_linear_shapes,
)
from vz_edge.planning.question import Question, all_tokens, tile_counts
from vz_edge.recipe import ModelSpec

# A process that holds a small model: Python, onnxruntime, the graphs, libraries' mapped pages. Measured: a 0.94 B
# bundle is 0.640 GB resident after loading, 0.525 GB of it repacked weights.
HOST_PROCESS_BYTES = 115_000_000
# The same with torch, transformers and bitsandbytes. Measured: a bundle with hardly any weights is 0.450 GB resident
# after loading (torch 2.13 for processors; what a torch for CUDA takes has not been measured).
TORCH_PROCESS_BYTES = 450_000_000
# What stays after the first picture, of its tiles and of ONNX Runtime's arena. Measured on the same bundle (and 0.05 GB
# on a 13B, profiles/reports/answer_memory.md).
AFTER_PICTURE_BYTES = 80_000_000
# The CUDA context with the kernels that were used. 300 to 400 MB where kernels load lazily, over 1000 MB where they do
# not (pytorch/pytorch issues 107667 and 109888); between the two. Of ONNX Runtime it is assumed.
CUDA_CONTEXT_BYTES = 700_000_000

# Widths alive at once: of the tower's (measured: five tiles take 0.21 GB in float32) and of the decoder's layers
# (measured: a 0.94 B decoder takes 253 kB a token of a prompt of 430 and of 1992 tokens, so nothing is quadratic).
VISION_HIDDEN_BUFFERS, VISION_INNER_BUFFERS = 10, 2
PREFILL_HIDDEN_BUFFERS, PREFILL_INNER_BUFFERS = 15, 6

# torch's caching allocator (c10/cuda/CUDACachingAllocator.cpp): kMinLargeAlloc and kRoundLarge.
OWN_SEGMENT_BYTES = 10 * 2**20
SEGMENT_ROUNDING_BYTES = 2 * 2**20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by stage and, within a stage, by part. The stages follow each other: what must fit is the largest."""

    stages: dict[str, dict[str, int]]

    @property
    def peak_stage(self) -> str:
        """The stage that needs the most."""
        return max(self.stages, key=lambda stage: sum(self.stages[stage].values()))

    @property
    def parts(self) -> dict[str, int]:
        """The parts of the largest stage."""
        return self.stages[self.peak_stage]

    @property
    def peak_bytes(self) -> int:
        """What must fit."""
        return sum(self.parts.values())


def onnxruntime_cpu_memory(model: ModelSpec, weights: WeightSpec, question: Question) -> MemoryPlan:
    """Resident memory (``VmHWM``) of a bundle on a processor; mapped files count while their pages are in use.

    Quantised weights are repacked when a session opens. The token table is mapped: some rows of it are ever read.
    """
    on_disk = bundle_bytes(model, weights, "cpu")
    decoder = model.decoder
    shapes = decoder_linear_shapes(decoder)
    head_shape = [(decoder.vocab_size, decoder.hidden_size)]
    always = {
        "decoder": _repacked_bytes(shapes, weights.bits, weights.block_size),
        "lm_head": _repacked_bytes(head_shape, weights.lm_head_bits, weights.block_size),
        "runtime": HOST_PROCESS_BYTES,
    }
    # Quantised layers of the tower are repacked and stay; float ones lie mapped in their file.
    tower = {"vision": on_disk["vision"]}
    resident_tower = tower if weights.vision_bits == 8 else {}
    scales = _scales_bytes(shapes, weights.bits, weights.block_size)
    scales += _scales_bytes(head_shape, weights.lm_head_bits, weights.block_size)
    after_picture = always | {"runtime": HOST_PROCESS_BYTES + AFTER_PICTURE_BYTES}
    return MemoryPlan(
        {
            # The file's scales and zero points stay mapped until all is repacked.
            "load": always | resident_tower | {"repacking": scales},
            "picture": always | tower | {"workspace": _vision_workspace(model, question, 4)},
            "answer": after_picture
            | resident_tower
            | {
                "kv_cache": question.context_tokens * kv_cache_bytes_per_token(decoder, "cpu"),
                "workspace": _prefill_workspace(model, question, 4),
            },
        }
    )


def onnxruntime_gpu_memory(model: ModelSpec, weights: WeightSpec, question: Question, unified: bool) -> MemoryPlan:
    """Memory of a bundle on a GPU; ``unified``: the host's process is in the same memory.

    Both sessions keep their weights and what their arena grew to, and the KV cache is allocated whole.
    """
    on_disk = bundle_bytes(model, weights, "cuda")
    resident = {part: on_disk[part] for part in ("vision", "decoder", "lm_head")}
    resident["runtime"] = CUDA_CONTEXT_BYTES + (HOST_PROCESS_BYTES + AFTER_PICTURE_BYTES if unified else 0)
    looking = _vision_workspace(model, question, 2)
    return MemoryPlan(
        {
            "picture": resident | {"workspace": looking},
            "answer": resident
            | {
                "kv_cache": question.context_tokens * kv_cache_bytes_per_token(model.decoder, "cuda"),
                "workspace": looking + _prefill_workspace(model, question, 2),
            },
        }
    )


def bitsandbytes_cpu_memory(model: ModelSpec, weights: WeightSpec, question: Question) -> MemoryPlan:
    """Resident memory of a bundle with bitsandbytes weights on a processor; the tower's weights are mapped.

    The checkpoint's token table is let go after loading: a bundle has its own, which is mapped.
    """
    on_disk, table = bundle_bytes(model, weights, "cpu"), _own_table_bytes(model)
    always = {
        "decoder": on_disk["decoder"] - table,
        "lm_head": on_disk["lm_head"],
        "runtime": TORCH_PROCESS_BYTES,
    }
    looking = {"vision": on_disk["vision"], "workspace": _vision_workspace(model, question, 4)}
    after_picture = always | {"runtime": TORCH_PROCESS_BYTES + AFTER_PICTURE_BYTES}
    return MemoryPlan(
        {
            "load": always | {"token_table": table},
            "picture": always | looking,
            "answer": after_picture | _bitsandbytes_answer(model, weights, question),
        }
    )


def bitsandbytes_gpu_memory(model: ModelSpec, weights: WeightSpec, question: Question, unified: bool) -> MemoryPlan:
    """The same on a GPU, where the tower stays; ``unified``: the host's process is in the same memory."""
    on_disk, table = bundle_bytes(model, weights, "cuda"), _own_table_bytes(model)
    resident = {
        "vision": on_disk["vision"],
        "decoder": on_disk["decoder"] - table,
        "lm_head": on_disk["lm_head"],
        "runtime": CUDA_CONTEXT_BYTES + (TORCH_PROCESS_BYTES + AFTER_PICTURE_BYTES if unified else 0),
    }
    looking = _vision_workspace(model, question, 2)
    answer = _bitsandbytes_answer(model, weights, question)
    return MemoryPlan(
        {
            "load": resident | {"token_table": table},
            "picture": resident | {"workspace": looking},
            "answer": resident | answer | {"workspace": looking + answer["workspace"]},
        }
    )


def _bitsandbytes_answer(model: ModelSpec, weights: WeightSpec, question: Question) -> dict[str, int]:
    """KV cache and workspace; **assumed** is that torch has as many buffers of a prompt as ONNX Runtime.

    A prompt is multiplied with NF4 weights that were unpacked to 16 bits, one layer at a time.
    """
    decoder = model.decoder
    parts = {
        "kv_cache": question.context_tokens * kv_cache_bytes_per_token(decoder, "cuda"),  # 16 bits on a processor too
        "workspace": _prefill_workspace(model, question, 2),
    }
    unpacked = {"unpacked_layer": max(2 * outputs * inputs for outputs, inputs in _separate_shapes(model))}
    return parts | (unpacked if weights.bits == 4 else {})


def _own_table_bytes(model: ModelSpec) -> int:
    """The checkpoint's token table where nothing but a prompt needs it."""
    decoder = model.decoder
    return 0 if decoder.tie_word_embeddings else 2 * decoder.vocab_size * decoder.hidden_size


def transformers_memory(model: ModelSpec, weights: WeightSpec, question: Question, selects: bool) -> MemoryPlan:
    """Memory of the paper's code on a GPU, as nvidia-smi shows it. ``selects``: with VisionZip.

    bitsandbytes converts the decoder's linear layers alone: lm_head and token table stay 16-bit, and so do tower and
    projector unless ``weights.vision_bits`` says otherwise. ``weights.block_size`` is not used: its blocks are its own.
    """
    decoder, tower = model.decoder, model.tower
    table = embedding_rows(model) * decoder.hidden_size * 2
    resident = {
        "vision": _linear_in_segments(vision_linear_shapes(model, tower.layers), weights.vision_bits),
        "token_table": table,
        "decoder": _linear_in_segments(_separate_shapes(model), weights.bits),
        "lm_head": decoder.vocab_size * decoder.hidden_size * 2,
        "runtime": CUDA_CONTEXT_BYTES,
    }
    prompt = question.prefill_tokens
    logits = prompt * decoder.vocab_size
    activations = 2 * prompt * (3 * decoder.intermediate_size + 4 * decoder.hidden_size)
    looking = _vision_workspace(model, question, 2)
    if selects:
        looking += question.tiles * tower.layers * tower.heads * (tower.patches + 1) ** 2 * 2
    hidden_states = question.tiles * (tower.layers + 1) * (tower.patches + 1) * tower.hidden_size * 2
    return MemoryPlan(
        {
            "picture": resident | {"workspace": looking + hidden_states},
            "prefill": resident
            | {"kv_cache": _cache_bytes(model, prompt), "workspace": activations + logits * (2 + 4)},
            "decode": resident
            | {
                "kv_cache": 2 * _cache_bytes(model, question.context_tokens),
                "workspace": logits * 4,
                "allocator": 0 if selects else 2 * _earlier_cache_bytes(model, question),
            },
        }
    )


def _vision_workspace(model: ModelSpec, question: Question, activation_bytes: int) -> int:
    tower = model.tower
    widths = VISION_HIDDEN_BUFFERS * tower.hidden_size + VISION_INNER_BUFFERS * tower.intermediate_size
    return question.tiles * (tower.patches + 1) * widths * activation_bytes


def _prefill_workspace(model: ModelSpec, question: Question, activation_bytes: int) -> int:
    """Linear in the prompt: GroupQueryAttention never holds the attention matrix; logits are of one position."""
    decoder = model.decoder
    widths = PREFILL_HIDDEN_BUFFERS * decoder.hidden_size + PREFILL_INNER_BUFFERS * decoder.intermediate_size
    return question.prefill_tokens * widths * activation_bytes + 4 * decoder.vocab_size


def _repacked_bytes(shapes: list[tuple[int, int]], bits: int, block_size: int) -> int:
    """Weights as ONNX Runtime's processor kernels hold them: a float32 scale and a float32 block sum a block."""
    if bits == 16:
        return linear_bytes(shapes, 16, block_size, ACTIVATION_BYTES["cpu"])
    return sum(outputs * -(-inputs // block_size) * (block_size * bits // 8 + 8) for outputs, inputs in shapes)


def _scales_bytes(shapes: list[tuple[int, int]], bits: int, block_size: int) -> int:
    if bits == 16:
        return 0
    blocks = [(outputs, -(-inputs // block_size)) for outputs, inputs in shapes]
    return sum(outputs * (count * 4 + -(-count * bits // 8)) for outputs, count in blocks)


def _linear_in_segments(shapes: list[tuple[int, int]], bits: int) -> int:
    """Linear layers in fp16 or as bitsandbytes stores them, the weights of each in segments of its own."""
    total = 0
    for outputs, inputs in shapes:
        weights = outputs * inputs * bits // 8
        scales = 0 if bits == 16 else bitsandbytes_bytes([(outputs, inputs)], bits) - weights
        total += _segment_bytes(weights) + scales
    return total


def _separate_shapes(model: ModelSpec) -> list[tuple[int, int]]:
    """Linear layers as a checkpoint has them: query, key, value, gate and up apart."""
    decoder = model.decoder
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    layer = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    return decoder.layers * [*layer, (inner, hidden), (inner, hidden), (hidden, inner)]


def _cache_bytes(model: ModelSpec, tokens: int) -> int:
    decoder = model.decoder
    return 2 * decoder.layers * _segment_bytes(2 * tokens * decoder.kv_heads * decoder.head_dim)


def _earlier_cache_bytes(model: ModelSpec, question: Question) -> int:
    """Segments left over from a picture of the smallest grid, where the present one's tensors do not fit into them."""
    smallest = tile_counts(model)[0]
    if smallest >= question.tiles:
        return 0
    earlier = question.context_tokens - question.image_tokens + all_tokens(model, smallest)
    width = 2 * model.decoder.kv_heads * model.decoder.head_dim
    if width * earlier < OWN_SEGMENT_BYTES:
        return 0
    return _cache_bytes(model, earlier)


def _segment_bytes(size: int) -> int:
    """What a tensor takes of the caching allocator: whole segments from 10 MiB on, smaller ones share segments."""
    if size < OWN_SEGMENT_BYTES:
        return size
    return -(-size // SEGMENT_ROUNDING_BYTES) * SEGMENT_ROUNDING_BYTES
