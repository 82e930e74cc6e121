"""The language model as a transformers checkpoint with bitsandbytes weights, written tensor by tensor.

What ``from_pretrained(..., quantization_config=BitsAndBytesConfig(...))`` makes of the whole model in memory and
``save_pretrained`` then writes is written here layer by layer. ``lm_head``, norms, biases and the token table keep 16
bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from vz_edge.backends.bitsandbytes_trial import OUTLIER_THRESHOLD
from vz_edge.backends.language_model_files import NF4_BLOCK, linear_layers, plain_tensors
from vz_edge.errors import UnsupportedModelError
from vz_edge.host.bnb.quantize import int8_tensors, nf4_tensors
from vz_edge.host.checkpoint import Checkpoint, canonical_name
from vz_edge.host.decoder_spec import decoder_config
from vz_edge.host.shards import write_shards
from vz_edge.recipe import DecoderSpec

# On a processor the language model runs in bf16: fp16 products of several rows are 50 times slower there.
DTYPES = {"cpu": torch.bfloat16, "cuda": torch.float16}
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
NF4_ROWS = 32  # bitsandbytes' processor kernels take this many rows at a time


def check_shapes(spec: DecoderSpec, bits: int) -> None:
    """Raise UnsupportedModelError for layers whose NF4 blocks would not fit bitsandbytes' kernels."""
    if bits == 8:
        return
    for name, rows, columns, _ in linear_layers(spec):
        if columns % NF4_BLOCK or rows % NF4_ROWS:
            raise UnsupportedModelError(
                f"{name} is {rows} x {columns}; bitsandbytes' 4-bit kernels take multiples of {NF4_ROWS} x "
                f"{NF4_BLOCK}: take --bits 8, or --format onnx"
            )


def write_language_model(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    bits: Literal[4, 8],
    target: Literal["cpu", "cuda"],
    stop_token_ids: tuple[int, ...],
    folder: Path,
    progress: Callable[[str, int], None],
) -> None:
    """Write config.json, generation_config.json and the shards into ``folder``, which is made.

    ``progress(name, bytes written)`` is called for each weight. Raises MissingTensorError and TensorShapeError.
    """
    folder.mkdir()
    dtype = DTYPES[target]
    config = decoder_config(spec).to_dict() | {
        "architectures": [CLASSES[spec.type]],
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": list(stop_token_ids),
        "quantization_config": quantization_config(bits, dtype),
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": list(stop_token_ids)})
    write_shards(folder, _tensors(checkpoint, spec, bits, dtype, progress))


def quantization_config(bits: Literal[4, 8], dtype: torch.dtype) -> dict[str, Any]:
    """The entry of config.json by which transformers knows how the layers are stored."""
    from transformers import BitsAndBytesConfig

    skipped = ["lm_head"]
    if bits == 8:
        options = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=OUTLIER_THRESHOLD, llm_int8_skip_modules=skipped
        )
    else:
        options = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,  # for both kinds, despite its name
        )
    found: dict[str, Any] = options.to_dict()
    return found


def _tensors(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    bits: Literal[4, 8],
    dtype: torch.dtype,
    progress: Callable[[str, int], None],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint, under transformers' names, made when it is asked for."""
    for name, shape in plain_tensors(spec):
        tensor = checkpoint.weight(canonical_name(name), shape).load().to(dtype)
        yield name, tensor
        progress(name, tensor.nbytes)
        del tensor  # before the next one is made
    for name, rows, columns, _ in linear_layers(spec):
        weight = checkpoint.weight(canonical_name(f"{name}.weight"), (rows, columns))
        tensors = nf4_tensors(weight, dtype) if bits == 4 else int8_tensors(weight)
        yield from ((f"{name}.{part}", tensor) for part, tensor in tensors.items())
        progress(name, sum(tensor.nbytes for tensor in tensors.values()))
        del tensors


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
