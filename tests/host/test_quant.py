"""Quantisers and packing: one contract, exact packing, and the numbers that ONNX Runtime multiplies with."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vz_edge.host.quant as quant_package
from vz_edge.host.graph import GraphBuilder
from vz_edge.host.quant import QuantConfig, Quantized, quantize
from vz_edge.host.quant.pack import dequantize, pack, pack_zero_points, unpack
from vz_edge.host.weight import ALL_ROWS, Weight

EVERY = [QuantConfig(bits, 32, method) for bits in (4, 8) for method in get_args(get_type_hints(QuantConfig)["method"])]


def weight_of(values: torch.Tensor, name: str = "layer.weight", squares: torch.Tensor | None = None) -> Weight:
    """A weight in memory, whose inputs all count the same unless told otherwise."""
    if squares is None:
        squares = torch.ones(values.shape[-1])
    return Weight(name, tuple(values.shape), lambda rows=ALL_ROWS: values[rows], squares)


def restored(q: Quantized, quant: QuantConfig, columns: int) -> torch.Tensor:
    return dequantize(q.packed, q.scales, q.zero_points, quant.bits, columns)


def heavy_tailed(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample(shape) * 0.02


@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_packing_is_undone_exactly(bits: int, rows: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, blocks, 16), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack(pack(values, bits), bits), values)
    zero_points = values[..., 0]
    assert torch.equal(unpack(pack_zero_points(zero_points, bits), bits)[:, :blocks], zero_points)


def test_even_values_lie_in_the_low_half_of_a_byte() -> None:
    assert pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("quant", EVERY, ids=str)
@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 20), columns=st.integers(1, 100), seed=st.integers(0, 2**31), chunk=st.integers(1, 2000))
def test_error_is_at_most_half_a_step_of_the_block_inside_its_grid(
    quant: QuantConfig, rows: int, columns: int, seed: int, chunk: int
) -> None:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant_package, "CHUNK_VALUES", chunk)
        q = quantize(weight_of(values), quant)
    assert q.scales.gt(0).all()
    steps = q.scales.repeat_interleave(quant.block_size, dim=1)[:, :columns]
    zeros = unpack(q.zero_points, quant.bits)[:, : q.scales.shape[1]].float()
    low = (-zeros * q.scales).repeat_interleave(quant.block_size, dim=1)[:, :columns]
    inside = values.float().clamp(low, low + steps * (2**quant.bits - 1))
    assert torch.all((restored(q, quant, columns) - inside).abs() <= steps * 0.5001)


@pytest.mark.parametrize("quant", EVERY, ids=str)
def test_zeros_and_what_lies_on_the_grid_stay_exact(quant: QuantConfig) -> None:
    values = torch.zeros(4, 96)
    values[1] = torch.arange(96) % 2**quant.bits * 0.25 - 1
    values[1, [0, 32, 64]], values[1, [31, 63, 95]] = -1.0, (2**quant.bits - 1) * 0.25 - 1
    values[2] = -3.0
    assert torch.equal(restored(quantize(weight_of(values), quant), quant, 96), values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [32, 128])
def test_hqq_has_a_smaller_error_than_rtn_in_every_norm_and_a_larger_in_no_block(bits: int, block_size: int) -> None:
    values = heavy_tailed(64, 1024)
    errors = {}
    for method in ("rtn", "hqq"):
        quant = QuantConfig(bits, block_size, method)  # type: ignore[arg-type]
        errors[method] = (restored(quantize(weight_of(values), quant), quant, 1024) - values).abs()
    for norm in (0.7, 1.0, 2.0):
        assert errors["hqq"].pow(norm).sum() < 0.99 * errors["rtn"].pow(norm).sum()
    by_block = {method: error.square().view(64, -1, block_size).sum(-1) for method, error in errors.items()}
    assert torch.all(by_block["hqq"] <= by_block["rtn"] * 1.0001)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [32, 128])
def test_weighted_changes_outputs_less_than_rtn_and_in_no_block_more(bits: Literal[4, 8], block_size: int) -> None:
    values, squares = heavy_tailed(64, 1000), torch.rand(1000, generator=torch.Generator().manual_seed(1)) ** 4
    errors = {}
    for method in ("rtn", "weighted"):
        quant = QuantConfig(bits, block_size, method)  # type: ignore[arg-type]
        q = quantize(weight_of(values, squares=squares), quant)
        error = squares * (restored(q, quant, 1000) - values).square()
        errors[method] = torch.nn.functional.pad(error, (0, -1000 % block_size)).view(64, -1, block_size).sum(-1)
    assert errors["weighted"].sum() < (0.8 if bits == 4 else 0.98) * errors["rtn"].sum()
    assert torch.all(errors["weighted"] <= errors["rtn"] * 1.0001)


def test_weighted_rounds_to_nearest_where_the_inputs_are_not_known() -> None:
    values = heavy_tailed(8, 100)
    unknown = replace(weight_of(values), input_squares=None)
    found, nearest = (quantize(unknown, QuantConfig(4, 32, method)) for method in ("weighted", "rtn"))
    assert torch.equal(found.packed, nearest.packed) and torch.equal(found.scales, nearest.scales)
    assert not torch.equal(found.scales, quantize(weight_of(values), QuantConfig(4, 32, "weighted")).scales)


def test_weighted_keeps_blocks_whose_inputs_are_always_zero() -> None:
    values, quant = heavy_tailed(8, 64), QuantConfig(4, 32, "weighted")
    q = quantize(weight_of(values, squares=torch.zeros(64)), quant)
    assert torch.equal(q.scales, quantize(weight_of(values), QuantConfig(4, 32, "rtn")).scales)


@pytest.mark.parametrize("quant", EVERY, ids=str)
@pytest.mark.parametrize("shape", [(48, 256), (8, 80), (3, 32)])
def test_onnx_runtime_multiplies_with_the_dequantised_weight(
    tmp_path: Path, quant: QuantConfig, shape: tuple[int, int]
) -> None:
    values, bias = heavy_tailed(*shape) * 50, torch.randn(shape[0])
    exact = QuantConfig(quant.bits, quant.block_size, quant.method, accuracy_level=1)
    graph = GraphBuilder("linear", ir.DataType.FLOAT)
    x = graph.input("x", ir.DataType.FLOAT, ["n", shape[1]])
    y = graph.linear(x, weight_of(values), weight_of(bias, "layer.bias"), exact)
    graph.output(y, "y", ir.DataType.FLOAT, ["n", shape[0]])
    graph.save(tmp_path / "linear.onnx", lambda *_: None)
    inputs = torch.randn(5, shape[1])
    (outputs,) = ort.InferenceSession(tmp_path / "linear.onnx").run(None, {"x": inputs.numpy()})
    expected = inputs @ restored(quantize(weight_of(values), quant), quant, shape[1]).T + bias
    assert np.allclose(outputs, expected.numpy(), atol=1e-4)


def test_saving_reads_each_row_once_reports_every_byte_and_keeps_nothing(tmp_path: Path) -> None:
    read: list[int] = []
    alive: list[weakref.ref[torch.Tensor]] = []

    def load(rows: slice = ALL_ROWS) -> torch.Tensor:
        read.extend(range(*rows.indices(300)))
        chunk = torch.randn(len(range(*rows.indices(300))), 4096)
        alive.append(weakref.ref(chunk))
        return chunk

    graph = GraphBuilder("linear", ir.DataType.FLOAT16)
    x = graph.input("x", ir.DataType.FLOAT16, ["n", 4096])
    small = weight_of(torch.randn(2, 64), "small.weight")  # its scales and zero points are kept in the .onnx file
    y = graph.linear(x, Weight("large.weight", (300, 4096), load), None, QuantConfig(4))
    z = graph.linear(graph.op("Slice", y, graph.ints(0), graph.ints(64), graph.ints(1)), small, None, QuantConfig(4))
    graph.output(z, "z", ir.DataType.FLOAT16, ["n", 2])
    reported: list[int] = []
    graph.save(tmp_path / "linear.onnx", lambda _, size: reported.append(size))
    assert sorted(read) == list(range(300))
    assert sum(reported) == graph.weight_bytes() == (tmp_path / "linear.onnx.data").stat().st_size
    gc.collect()
    assert all(reference() is None for reference in alive)
    ort.InferenceSession(tmp_path / "linear.onnx")
