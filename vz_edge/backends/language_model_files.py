"""The tensors of a language model with bitsandbytes weights, and whether a bundle's folder holds them.

A bundle may have been put together from two, or its files edited. What transformers says of such a checkpoint points to
a report that it prints, and some of it is first noticed by a kernel; what is compared here is known before a weight is
read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vz_edge.bundle import Manifest
from vz_edge.device.process import one_line
from vz_edge.errors import CorruptBundleError
from vz_edge.recipe import DecoderSpec

Shape = tuple[int, ...]
INDEX = "model.safetensors.index.json"
BITS_LOADED = {"load_in_4bit": 4, "load_in_8bit": 8}  # by what config.json's quantization_config says
NF4_BLOCK = 64
SCALES_BLOCK = 256  # scales of NF4 that share a scale themselves


def linear_layers(spec: DecoderSpec) -> Iterator[tuple[str, int, int, bool]]:
    """(name, outputs, inputs, whether it has a bias) of every layer that is quantised."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    for number in range(spec.layers):
        layer = f"model.layers.{number}"
        yield f"{layer}.self_attn.q_proj", queries, hidden, spec.qkv_bias
        yield f"{layer}.self_attn.k_proj", keys, hidden, spec.qkv_bias
        yield f"{layer}.self_attn.v_proj", keys, hidden, spec.qkv_bias
        yield f"{layer}.self_attn.o_proj", hidden, queries, spec.output_bias
        yield f"{layer}.mlp.gate_proj", inner, hidden, spec.mlp_bias
        yield f"{layer}.mlp.up_proj", inner, hidden, spec.mlp_bias
        yield f"{layer}.mlp.down_proj", hidden, inner, spec.mlp_bias


def plain_tensors(spec: DecoderSpec) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor that keeps 16 bits."""
    hidden = spec.hidden_size
    yield "model.embed_tokens.weight", (spec.vocab_size, hidden)
    if not spec.tie_word_embeddings:
        yield "lm_head.weight", (spec.vocab_size, hidden)
    for number in range(spec.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{number}.{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    for name, rows, _, has_bias in linear_layers(spec):
        if has_bias:
            yield f"{name}.bias", (rows,)


def quantized_tensors(spec: DecoderSpec, bits: int) -> Iterator[tuple[str, Shape]]:
    """Name and shape of weights and scales of every layer that is quantised, as bitsandbytes stores them."""
    for name, rows, columns, _ in linear_layers(spec):
        if bits == 8:
            yield f"{name}.weight", (rows, columns)
            yield f"{name}.SCB", (rows,)
        else:
            scales = rows * columns // NF4_BLOCK
            yield f"{name}.weight", (rows * columns // 2, 1)
            yield f"{name}.weight.absmax", (scales,)
            yield f"{name}.weight.nested_absmax", (-(-scales // SCALES_BLOCK),)


def check_language_model(folder: Path, manifest: Manifest) -> None:
    """Raise CorruptBundleError where ``folder`` does not hold the language model that ``manifest`` describes.

    Its config.json and the headers of its shards are read.
    """
    decoder, bits = manifest.model.decoder, manifest.weights.bits
    _check_config(folder / "config.json", decoder, bits)
    stored = stored_tensors(folder)
    for name, shape in chain(plain_tensors(decoder), quantized_tensors(decoder, bits)):
        found = stored.get(name)
        if found != shape:
            how = "is missing" if found is None else f"has shape {list(found)}, expected {list(shape)}"
            raise CorruptBundleError(f"{folder}: {name} {how}; copy or export the bundle again")


def stored_tensors(folder: Path) -> dict[str, Shape]:
    """Shapes by name of all tensors in the shards that the index names. Raises CorruptBundleError."""
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CorruptBundleError(f"{folder / INDEX} has no weight_map; copy or export the bundle again")
    stored: dict[str, Shape] = {}
    for shard in sorted(set(weight_map.values())):
        try:
            with safe_open(folder / shard, framework="pt") as file:
                stored |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CorruptBundleError(
                f"{folder / shard} cannot be read as safetensors ({one_line(error)}); copy or export the bundle again"
            ) from error
    return stored


def _check_config(path: Path, decoder: DecoderSpec, bits: int) -> None:
    config = _read_json(path)
    quantization = config.get("quantization_config")
    loaded = quantization if isinstance(quantization, dict) else {}
    found_and_expected = {
        "model_type": (config.get("model_type"), decoder.type),
        "hidden_size": (config.get("hidden_size"), decoder.hidden_size),
        "num_hidden_layers": (config.get("num_hidden_layers"), decoder.layers),
        "num_attention_heads": (config.get("num_attention_heads"), decoder.heads),
        "num_key_value_heads": (config.get("num_key_value_heads"), decoder.kv_heads),
        "intermediate_size": (config.get("intermediate_size"), decoder.intermediate_size),
        "vocab_size": (config.get("vocab_size"), decoder.vocab_size),
        "bits": (next((number for key, number in BITS_LOADED.items() if loaded.get(key)), 16), bits),
    }
    for what, (found, expected) in found_and_expected.items():
        if found != expected:
            raise CorruptBundleError(
                f"{path} says {what} {found!r} and the manifest {expected!r}: they do not belong together; copy or "
                "export the bundle again"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptBundleError(
            f"{path} cannot be read as JSON ({one_line(error)}); copy or export the bundle again"
        ) from error
    if not isinstance(data, dict):
        raise CorruptBundleError(f"{path} holds no JSON object; copy or export the bundle again")
    return data
