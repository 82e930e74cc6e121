"""The ways to store a linear layer: the numbers that a runtime multiplies with, and their size.

What the exporter offers goes through the exporter's own functions and bitsandbytes' own; the others are tried here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from bitsandbytes import functional

from benchmarks.quantizers import weight_of
from vz_edge.host.bnb.quantize import int8_tensors, nf4_tensors
from vz_edge.host.quant import QuantConfig, quantize
from vz_edge.host.quant.pack import dequantize
from vz_edge.planning.memory import ACTIVATION_BYTES, bitsandbytes_bytes, linear_bytes

Shapes = list[tuple[int, int]]
# Where mean squares of inputs come from: the exporter's own text and picture; text and pictures of the kind that the
# model is asked about; tokens drawn at random; nowhere, so that all inputs count alike.
EXPORT, ALIKE, RANDOM, UNIFORM = "the export's", "alike", "random tokens", "nothing"


@dataclass(frozen=True)
class Form:
    """One way: ``restore`` gives a float32 weight [out, in] as it comes back, ``size`` the bytes of layers on disk.

    ``restore`` also takes the mean square of each of the layer's inputs [in], found on ``source``, which most ways do
    without; ``size`` takes shapes and the bytes of an activation, which are those of a scale.
    """

    name: str
    restore: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    size: Callable[[Shapes, int], int]
    source: str = UNIFORM


@dataclass(frozen=True)
class Setting:
    """How a model is stored: all layers as ``linear``, but lm_head and the kinds of layer in ``apart``."""

    linear: Form
    lm_head: Form
    apart: dict[str, Form] = field(default_factory=dict)

    def form(self, kind: str) -> Form:
        """How layers of this kind are stored: "q_proj"..., "lm_head"."""
        return self.lm_head if kind == "lm_head" else self.apart.get(kind, self.linear)

    @property
    def name(self) -> str:
        """The layers' form, then what is apart."""
        return ", ".join([self.linear.name, *(f"{kind} {form.name}" for kind, form in self.apart.items())])

    def bits_a_weight(self, shapes: dict[str, Shapes], target: Literal["cpu", "cuda"]) -> float:
        """On disk with scales and zero points, over the layers of all kinds but lm_head."""
        layers = {kind: listed for kind, listed in shapes.items() if kind != "lm_head"}
        size = sum(self.form(kind).size(listed, ACTIVATION_BYTES[target]) for kind, listed in layers.items())
        return 8 * size / sum(rows * columns for listed in layers.values() for rows, columns in listed)


def blocks(bits: Literal[4, 8], block_size: int, method: Literal["rtn", "hqq", "weighted"] = "rtn") -> Form:
    """As the exporter quantises."""
    quant = QuantConfig(bits, block_size, method)

    def restore(values: torch.Tensor, mean_squares: torch.Tensor) -> torch.Tensor:
        q = quantize(weight_of(values, mean_squares), quant)
        return dequantize(q.packed, q.scales, q.zero_points, bits, values.shape[1])

    return Form(
        f"{method.upper()} {bits} bits/{block_size}",
        restore,
        lambda shapes, activation_bytes: linear_bytes(shapes, bits, block_size, activation_bytes),
    )


def symmetric(block_size: int) -> Form:
    """Round to nearest to 4 bits with the zero point in the middle, which then need not be stored."""

    def restore(values: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        cut = torch.nn.functional.pad(values, (0, -values.shape[1] % block_size)).unflatten(1, (-1, block_size))
        low, high = cut.amin(-1, keepdim=True), cut.amax(-1, keepdim=True)
        scales = torch.where(high > -low, high, low) / -8  # the value farthest from zero gets the lowest integer
        scales.masked_fill_(scales == 0, 1)
        return ((cut / scales).round().clamp(-8, 7) * scales).flatten(1)[:, : values.shape[1]]

    def size(shapes: Shapes, activation_bytes: int) -> int:
        return sum(rows * -(-columns // block_size) * (block_size // 2 + activation_bytes) for rows, columns in shapes)

    return Form(f"RTN 4 bits/{block_size}, symmetric", restore, size)


def weighted(block_size: int, source: str = EXPORT) -> Form:
    """As the exporter quantises to 4 bits by what layers are multiplied with, which ``source`` says."""
    form = blocks(4, block_size, "weighted")
    read = "" if source == EXPORT else f" by {source}"
    return replace(form, name=f"weighted{read} 4 bits/{block_size}", source=source)


def _nf4(values: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    tensors = nf4_tensors(weight_of(values), torch.float32)
    parts = {name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name != "weight"}
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    return functional.dequantize_4bit(tensors["weight"], state)


def _int8(values: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    tensors = int8_tensors(weight_of(values))
    return functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])


NF4 = Form("NF4", _nf4, lambda shapes, _: bitsandbytes_bytes(shapes, 4))
INT8 = Form("LLM.int8()", _int8, lambda shapes, _: bitsandbytes_bytes(shapes, 8))
FP16 = Form(
    "fp16",
    lambda values, _: values.half().float(),
    lambda shapes, activation_bytes: linear_bytes(shapes, 16, 0, activation_bytes),
)
