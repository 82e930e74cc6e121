"""Make a random checkpoint of a published model's true shape, as fast as the disk writes.

What an export needs in time and memory, and what a bundle needs to answer, depends on the shapes of the
weights and not on their values: a random 13B measures as the real one does. Files are as the hub has them:
bf16 safetensors shards of at most 5 GB with an index, the older key names, config, tokenizer, processor.

    python -m benchmarks.make_checkpoint llava-next-13b build/benchmarks/llava-next-13b   # 26.7 GB
    python -m benchmarks.make_checkpoint 1b build/benchmarks/1b                           # 2.5 GB
    python -m benchmarks.make_checkpoint 1b build/benchmarks/1b-decoder --part decoder    # 1.9 GB, a plain Llama

SHAPE is a recipe's name, ``1b`` (a 0.94 B Llama of 2048 x 16 layers with the CLIP-L tower) or ``tiny``
(for trying the benchmarks). Numbers come from one random block that every tensor reads from a place of its
own, so that memory stays below 1 GB and the same name always gets the same numbers. A finished folder is
left as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from vz_edge.recipe import DecoderSpec, ModelSpec, TowerSpec, load_recipe

SHARD_BYTES = 5_000_000_000
BLOCK_VALUES = 33_554_393  # a prime: rows of a large tensor do not repeat in step
INDEX = "model.safetensors.index.json"
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
Part = Literal["all", "decoder", "vision"]


@dataclass(frozen=True)
class RandomTensor:
    """A tensor to write: bf16 normal numbers of that deviation, or all of one value where it is None."""

    name: str
    shape: tuple[int, ...]
    deviation: float | None
    value: float = 0.0

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return 2 * math.prod(self.shape)


def model_of_shape(shape: str) -> ModelSpec:
    """The model that ``SHAPE`` names."""
    if shape == "1b":
        decoder = DecoderSpec("llama", 2048, 5504, 16, 16, 16, 128, 32064, 4096)
        return ModelSpec("llava_next", decoder, 32000, grid_pinpoints=PINPOINTS)
    if shape == "tiny":
        decoder = DecoderSpec("llama", 256, 512, 2, 2, 2, 128, 512, 4096)
        return ModelSpec("llava_next", decoder, 500, TowerSpec("clip", 128, 256, 4, 2), grid_pinpoints=PINPOINTS)
    return load_recipe(shape).model


def make_checkpoint(model: ModelSpec, folder: Path, part: Part) -> int:
    """Write the checkpoint (``part`` "decoder": a plain Llama with the same numbers); return its shards' bytes."""
    tensors = list(_tensors(model, part))
    total_bytes = sum(tensor.size_bytes for tensor in tensors)
    if (folder / INDEX).exists():
        return total_bytes
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < 1.1 * total_bytes:
        raise SystemExit(f"{folder} needs {total_bytes / 1e9:.1f} GB of disk and that is not free")
    shards = list(_shards(tensors))
    files = {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        _write_shard(folder / file, shard)
    write_configs(model, folder, part)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {tensor.name: file for file, shard in files.items() for tensor in shard},
    }
    _write_json(folder / INDEX, index)
    return total_bytes


def _tensors(model: ModelSpec, part: Part) -> Iterator[RandomTensor]:
    prefix = "" if part == "decoder" else "language_model."
    if part != "vision":
        yield from _decoder_tensors(model.decoder, prefix)
    if part != "decoder":
        yield from _vision_tensors(model)


def _decoder_tensors(decoder: DecoderSpec, prefix: str) -> Iterator[RandomTensor]:
    hidden, mlp = decoder.hidden_size, decoder.intermediate_size
    queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    yield _linear(f"{prefix}model.embed_tokens", decoder.vocab_size, hidden)
    for number in range(decoder.layers):
        layer = f"{prefix}model.layers.{number}"
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield _linear(f"{layer}.self_attn.{name}_proj", rows, hidden)
            if decoder.qkv_bias:
                yield _constant(f"{layer}.self_attn.{name}_proj.bias", rows, 0)
        yield _linear(f"{layer}.self_attn.o_proj", hidden, queries)
        yield _linear(f"{layer}.mlp.gate_proj", mlp, hidden)
        yield _linear(f"{layer}.mlp.up_proj", mlp, hidden)
        yield _linear(f"{layer}.mlp.down_proj", hidden, mlp)
        yield _constant(f"{layer}.input_layernorm.weight", hidden, 1)
        yield _constant(f"{layer}.post_attention_layernorm.weight", hidden, 1)
    yield _constant(f"{prefix}model.norm.weight", hidden, 1)
    if not decoder.tie_word_embeddings:
        yield _linear(f"{prefix}lm_head", decoder.vocab_size, hidden)


def _vision_tensors(model: ModelSpec) -> Iterator[RandomTensor]:
    tower, out = model.tower, model.decoder.hidden_size
    hidden, side = tower.hidden_size, tower.patch_size
    prefix = "vision_tower.vision_model"
    deviation = hidden**-0.5
    yield RandomTensor(f"{prefix}.embeddings.class_embedding", (hidden,), deviation)
    patch_shape = (hidden, 3, side, side)
    yield RandomTensor(f"{prefix}.embeddings.patch_embedding.weight", patch_shape, (3 * side * side) ** -0.5)
    yield RandomTensor(f"{prefix}.embeddings.position_embedding.weight", (1 + tower.patches, hidden), deviation)
    yield from _layer_norm(f"{prefix}.pre_layrnorm", hidden)
    for number in range(tower.layers):
        layer = f"{prefix}.encoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear_with_bias(f"{layer}.self_attn.{name}", hidden, hidden)
        yield from _layer_norm(f"{layer}.layer_norm1", hidden)
        yield from _linear_with_bias(f"{layer}.mlp.fc1", tower.intermediate_size, hidden)
        yield from _linear_with_bias(f"{layer}.mlp.fc2", hidden, tower.intermediate_size)
        yield from _layer_norm(f"{layer}.layer_norm2", hidden)
    yield from _layer_norm(f"{prefix}.post_layernorm", hidden)
    yield from _linear_with_bias("multi_modal_projector.linear_1", out, hidden)
    yield from _linear_with_bias("multi_modal_projector.linear_2", out, out)
    if model.grid_pinpoints:
        yield RandomTensor("image_newline", (out,), out**-0.5)


def _linear(name: str, rows: int, columns: int) -> RandomTensor:
    return RandomTensor(f"{name}.weight", (rows, columns), columns**-0.5)


def _linear_with_bias(name: str, rows: int, columns: int) -> Iterator[RandomTensor]:
    yield _linear(name, rows, columns)
    yield _constant(f"{name}.bias", rows, 0)


def _layer_norm(name: str, size: int) -> Iterator[RandomTensor]:
    yield _constant(f"{name}.weight", size, 1)
    yield _constant(f"{name}.bias", size, 0)


def _constant(name: str, size: int, value: float) -> RandomTensor:
    return RandomTensor(name, (size,), None, value)


def _shards(tensors: list[RandomTensor]) -> Iterator[list[RandomTensor]]:
    shard: list[RandomTensor] = []
    for tensor in tensors:
        if shard and sum(other.size_bytes for other in shard) + tensor.size_bytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write_shard(path: Path, shard: list[RandomTensor]) -> None:
    """A safetensors file: length of the header in 8 bytes, the header in JSON, the numbers in its order."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.size_bytes
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in shard:
            _write_tensor(file, tensor)


def _write_tensor(file: BinaryIO, tensor: RandomTensor) -> None:
    values = math.prod(tensor.shape)
    if tensor.deviation is None:
        file.write(_bf16(np.full(values, tensor.value, np.float32)).tobytes())
        return
    block = _block(tensor.deviation)
    start = zlib.crc32(tensor.name.removeprefix("language_model.").encode()) % BLOCK_VALUES
    while values:
        piece = block[start : start + values]
        file.write(piece.data)
        values -= len(piece)
        start = 0


@lru_cache(maxsize=4)
def _block(deviation: float) -> np.ndarray:
    numbers = np.random.default_rng(0).standard_normal(BLOCK_VALUES, dtype=np.float32)
    numbers *= deviation
    return _bf16(numbers)


def _bf16(numbers: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, which are bfloat16 numbers rounded towards zero."""
    return np.ascontiguousarray(numbers.view(np.uint16)[1::2])


def write_configs(model: ModelSpec, folder: Path, part: Part) -> None:
    """Write all of the checkpoint but its shards: config, tokenizer, processor."""
    config = _text_config(model.decoder) if part == "decoder" else llava_config(model)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    _write_json(folder / "tokenizer.json", _tokenizer(model.image_token_id))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": model.decoder.context_length,
        "chat_template": TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    if part != "decoder":
        _write_json(folder / "preprocessor_config.json", _preprocessor_config(model))


def _text_config(decoder: DecoderSpec) -> dict:
    config = {
        "architectures": [{"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[decoder.type] + "ForCausalLM"],
        "model_type": decoder.type,
        "hidden_act": "silu",
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.context_length,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": decoder.rope_scaling,
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    return config if decoder.sliding_window is None else config | {"sliding_window": decoder.sliding_window}


def llava_config(model: ModelSpec) -> dict:
    """The whole model's ``config.json``."""
    tower = model.tower
    names = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
    config = {
        "architectures": [names[model.family]],
        "model_type": model.family,
        "text_config": _text_config(model.decoder),
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": tower.hidden_size,
            "intermediate_size": tower.intermediate_size,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "hidden_act": tower.activation,
        },
        "image_token_index": model.image_token_id,
        "projector_hidden_act": model.projector_activation,
        "vision_feature_layer": model.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": model.decoder.tie_word_embeddings,
        "torch_dtype": "bfloat16",
    }
    pinpoints = [list(size) for size in model.grid_pinpoints]  # as JSON has them
    return config | ({"image_grid_pinpoints": pinpoints} if pinpoints else {})


def _preprocessor_config(model: ModelSpec) -> dict:
    side = model.tower.image_size
    config = {
        "image_processor_type": "LlavaNextImageProcessor" if model.grid_pinpoints else "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    return config | ({"image_grid_pinpoints": model.grid_pinpoints, "do_pad": True} if model.grid_pinpoints else {})


def _tokenizer(image_token_id: int) -> dict:
    """A byte-level tokenizer without merges: any text becomes valid ids, a byte each."""
    from tokenizers.pre_tokenizers import ByteLevel

    specials = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": image_token_id}
    vocabulary = specials | {byte: 3 + number for number, byte in enumerate(sorted(ByteLevel.alphabet()))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": text, **flags} for text, number in specials.items()],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and make the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", metavar="SHAPE")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", choices=("all", "decoder", "vision"), default="all")
    arguments = parser.parse_args()
    model = model_of_shape(arguments.shape)
    size_bytes = make_checkpoint(model, arguments.folder, arguments.part)
    print(f"{arguments.folder}: {size_bytes / 1e9:.2f} GB, {json.dumps(asdict(model.decoder))}")


if __name__ == "__main__":
    main()
