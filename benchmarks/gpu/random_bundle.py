"""Bundles of true shape with random weights, made in seconds: what an export would write, but for the numbers.

    python -m benchmarks.gpu.random_bundle llava-next-13b build/benchmarks/gpu/13b --bits 4 --tokens 320

Time and memory depend on no weight's value. So the graphs are those of the exporter, by its own builder, and their
weights are read from a small file of random numbers that lies beside each: tensors of one kind and width begin at the
same place of it. ONNX Runtime copies each of them to the device by itself, so that the device's memory holds all of
them, and a step reads every byte that it would read of a trained model. No checkpoint is written and none is read.

What differs from an exported bundle is the file's size, the time to load it, and that it answers nonsense. Its manifest
records no parity.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.make_checkpoint import llava_config, model_of_shape, write_configs
from vz_edge import __version__
from vz_edge.budget import parse_budgets
from vz_edge.bundle import FORMAT_VERSION, Manifest, WeightSpec, default_weights, write_manifest
from vz_edge.host.decoder_graph import DecoderQuant, build_decoder
from vz_edge.host.export import PRECISION
from vz_edge.host.graph import GraphBuilder
from vz_edge.host.preprocessing import image_spec, read_settings, settings_to_write
from vz_edge.host.quant import quant_config
from vz_edge.host.text_files import stop_spec, write_chat_template, write_tokenizer
from vz_edge.host.vision_graph import build_vision
from vz_edge.host.weight import ALL_ROWS, Weight
from vz_edge.planning.memory import embedding_rows, kv_cache_bytes_per_token
from vz_edge.recipe import ModelSpec
from vz_edge.staging import staged_folder

ALIGNMENT = 4096  # of a place in the file; ONNX Runtime maps whole pages
DISTINCT = 1 << 24  # so many numbers are drawn of a kind and then repeated
UNIFORM_DEVIATION = {4: math.sqrt((16**2 - 1) / 12), 8: math.sqrt((256**2 - 1) / 12)}  # of whole numbers below 2**bits
ZERO_POINTS = {4: 0x88, 8: 0x80}  # the middle, packed
NUMPY = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.UINT8: np.dtype(np.uint8),
}


class NoCheckpoint:
    """Where the graph builders ask for weights: their shapes are all that is there."""

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """As ``Checkpoint.weight``; zeros, should one be read."""

        def zeros(rows: slice = ALL_ROWS) -> torch.Tensor:
            return torch.zeros(shape)[rows]

        return Weight(name, tuple(shape), zeros)


class Fill:
    """What a tensor is filled with, and where it lies: tensors with equal keys share their numbers."""

    def __init__(self, key: tuple[object, ...], draw: Callable[[np.random.Generator, int], np.ndarray]) -> None:
        self.key, self.draw = key, draw


def normal(deviation: float, dtype: np.dtype) -> Fill:
    """Normal numbers."""
    return Fill(
        ("normal", deviation, dtype),
        lambda rng, count: (rng.standard_normal(count, dtype=np.float32) * deviation).astype(dtype),
    )


def constant(value: float, dtype: np.dtype) -> Fill:
    """One value."""
    return Fill(("constant", value, dtype), lambda _, count: np.full(count, value, dtype))


def random_bytes() -> Fill:
    """Bytes, any value as likely."""
    return Fill(("bytes",), lambda rng, count: rng.integers(0, 256, count, dtype=np.uint8))


def fill_of(name: str, shape: Sequence[int], dtype: np.dtype, blocks: dict[str, tuple[int, int]]) -> Fill:
    """What makes activations neither vanish nor overflow; ``blocks`` are bits and input width of a quantised weight."""
    weight, _, part = name.rpartition(".")
    if part == "packed":
        return random_bytes()
    if part == "zero_points":
        return constant(ZERO_POINTS[blocks[weight][0]], dtype)
    if part == "scales":
        bits, width = blocks[weight]
        return constant(width**-0.5 / UNIFORM_DEVIATION[bits], dtype)
    if len(shape) == 1 and "class_embedding" not in name and name != "image_newline":
        is_norm = "norm" in name and part == "weight"
        return constant(1.0 if is_norm else 0.0, dtype)
    fan_in = shape[0] if part == "transposed" else math.prod(shape[1:]) or shape[0]
    return normal(fan_in**-0.5, dtype)


@dataclass
class WeightFile:
    """A file of random numbers that the tensors of one graph lie in, one over another."""

    path: Path
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    size_bytes: int = 0

    def write(self, fill: Fill, nbytes: int, dtype: np.dtype) -> int:
        """Append ``nbytes`` of ``fill``; where they begin."""
        start = -(-self.size_bytes // ALIGNMENT) * ALIGNMENT
        count = nbytes // dtype.itemsize
        piece = fill.draw(self.rng, min(count, DISTINCT))
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.seek(start)
            while count:
                written = piece[:count]
                file.write(written.data)
                count -= len(written)
        self.size_bytes = start + nbytes
        return start


def save_random(graph: GraphBuilder, path: Path) -> int:
    """Write ``graph`` with random weights in ``path.data``; the bytes of its weights."""
    blocks = _quantised(graph)
    lazy = {
        name: value.const_value
        for name, value in graph.graph.initializers.items()
        if isinstance(value.const_value, ir.LazyTensor)
    }
    fills = {name: fill_of(name, tensor.shape.numpy(), NUMPY[tensor.dtype], blocks) for name, tensor in lazy.items()}
    longest: dict[tuple[object, ...], str] = {}
    for name in sorted(lazy, key=lambda name: lazy[name].nbytes):
        longest[fills[name].key] = name  # the last one is the longest
    file = WeightFile(path.with_name(f"{path.name}.data"))
    places = {key: file.write(fills[name], lazy[name].nbytes, NUMPY[lazy[name].dtype]) for key, name in longest.items()}
    for name, tensor in lazy.items():
        graph.graph.initializers[name].const_value = ir.ExternalTensor(
            file.path.name, places[fills[name].key], tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name
        )
    ir.save(graph.model(), path)
    return graph.weight_bytes()


def _quantised(graph: GraphBuilder) -> dict[str, tuple[int, int]]:
    """Bits and input width of each quantised weight by its name."""
    found = {}
    for node in graph.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            packed = node.inputs[1]
            assert packed is not None and packed.name is not None
            name = packed.name.removesuffix(".packed")
            found[name] = (node.attributes["bits"].as_int(), node.attributes["K"].as_int())
    return found


def make_bundle(shape: str, folder: Path, weights: WeightSpec, tokens: str, target: Literal["cpu", "cuda"]) -> Manifest:
    """Write the bundle that an export of a model of ``shape`` (make_checkpoint.py) would give, its numbers aside."""
    model = model_of_shape(shape)
    budgets = parse_budgets(tokens, model.max_tiles, model.tower.patches)
    precision, source = PRECISION[target], NoCheckpoint()
    with staged_folder(folder, force=True) as staging, tempfile.TemporaryDirectory() as configs:
        write_configs(model, Path(configs), "all")
        config = llava_config(model)
        write_tokenizer(Path(configs), staging, model, is_original=False)
        write_chat_template(Path(configs), staging, None)
        settings = read_settings(Path(configs), config)
        (staging / "preprocessor_config.json").write_text(json.dumps(settings_to_write(settings)), encoding="utf-8")
        image = image_spec(settings, config, model, None, "stock")
        stop = stop_spec(Path(configs), config, staging / "tokenizer.json", None)
        linear, head = (quant_config(bits, weights) for bits in (weights.bits, weights.lm_head_bits))
        decoder = build_decoder(source, model.decoder, precision, DecoderQuant(linear, head))  # type: ignore[arg-type]
        vision_quant = quant_config(weights.vision_bits, weights)
        vision = build_vision(source, model, budgets, precision, vision_quant)  # type: ignore[arg-type]
        predicted = {
            "decoder_bytes": save_random(decoder, staging / "decoder.onnx"),
            "vision_bytes": save_random(vision, staging / "vision.onnx"),
            "kv_cache_bytes_per_token": kv_cache_bytes_per_token(model.decoder, target),
        }
        _write_table(model, staging / "embedding.data")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            created_by=f"vz-edge {__version__}",
            name=folder.name,
            checkpoint=f"random weights of the shape {shape}",
            model=model,
            target=target,
            budget=budgets[0] if budgets else None,
            weights=weights,
            image=image,
            stop=stop,
            more_budgets=budgets[1:],
            predicted=predicted,
        )
        return write_manifest(staging, manifest, lambda *_: None)


def _write_table(model: ModelSpec, path: Path) -> None:
    hidden = model.decoder.hidden_size
    float16 = np.dtype(np.float16)
    WeightFile(path).write(normal(hidden**-0.5, float16), embedding_rows(model) * hidden * 2, float16)


def main() -> None:
    """Make one bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=4)
    parser.add_argument("--block-size", type=int, default=default_weights(4).block_size)
    parser.add_argument("--tokens", default="320")
    parser.add_argument("--target", choices=("cpu", "cuda"), default="cuda")
    arguments = parser.parse_args()
    started = time.perf_counter()
    weights = replace(default_weights(arguments.bits), block_size=arguments.block_size)
    manifest = make_bundle(arguments.shape, arguments.folder, weights, arguments.tokens, arguments.target)
    size = sum(manifest.predicted[part] for part in ("decoder_bytes", "vision_bytes"))
    print(f"{arguments.folder}: {size / 1e9:.2f} GB of weights, made in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
