"""What the report on stored weights stands on: shuffled channels, errors of layers, sizes, and paired changes."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("bitsandbytes")
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import Report
from benchmarks.smollm2 import documentation, shuffle_channels, windows
from benchmarks.stored_weights import ALIKE, FP16, INT8, NF4, UNIFORM, Form, Setting, blocks, symmetric, weighted
from benchmarks.weights_quality import (
    KINDS,
    SETTINGS,
    Asked,
    Outcome,
    Replaceable,
    change,
    layer_rows,
    layer_shapes,
    read_text,
    row,
)
from vz_edge.planning.memory import decoder_linear_shapes, linear_bytes
from vz_edge.recipe import load_recipe


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )
    found = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in found.parameters():
        parameter.copy_((torch.randn_like(parameter) * 0.2).half())
    return found


IDS = torch.arange(40)[None]


def test_shuffled_channels_compute_the_same_from_other_blocks(model: LlamaForCausalLM) -> None:
    before, weights = model(IDS).logits, {name: value.clone() for name, value in model.named_parameters()}
    shuffle_channels(model, seed=0)
    assert torch.allclose(model(IDS).logits, before, atol=1e-5)
    for name, value in model.named_parameters():
        if name.endswith("_proj.weight"):
            columns, columns_before = value.sort(0).values, weights[name].sort(0).values
            assert columns.eq(columns_before).all(0).float().mean() < 0.2, name


def test_documentation_is_cut_into_windows() -> None:
    text = documentation("textwrap")
    assert text.startswith("Text wrapping and filling.") and "Collapse and truncate the given text" in text

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    cut = windows(tokenizer, ["textwrap", "heapq"], count=2, length=100)
    assert bytes(cut.flatten().tolist()).decode() == text[:200]
    with pytest.raises(ValueError, match="windows"):
        windows(tokenizer, ["heapq"], count=1000, length=100)


@pytest.mark.parametrize(
    ("form", "largest"),
    [
        (FP16, 0.0),
        (INT8, 0.02),
        (NF4, 0.12),
        (blocks(8, 128), 0.02),
        (blocks(4, 32, "hqq"), 0.12),
        (symmetric(32), 0.13),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_errors_of_layers_are_those_of_their_outputs(model: LlamaForCausalLM, form, largest: float) -> None:
    replaceable = Replaceable(model)
    read = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0][0]))
    with replaceable.recording():
        model(IDS)
    original = model.model.layers[1].mlp.down_proj.weight.clone()
    replaceable.replace(Setting(form, FP16))
    errors = replaceable.errors()
    assert errors["lm_head"] == (0.0,)
    assert all(
        len(found) == 2 and 0 <= min(found) <= max(found) <= largest
        for kind, found in errors.items()
        if kind != "lm_head"
    )
    expected = read[0] @ original.T
    found = model.model.layers[1].mlp.down_proj(read[0])
    assert errors["down_proj"][1] == pytest.approx(float((found - expected).norm() / expected.norm()), abs=1e-6)
    replaceable.replace(Setting(FP16, FP16))
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, original)


def test_layers_apart_and_lm_head_have_their_own_form(model: LlamaForCausalLM) -> None:
    replaceable = Replaceable(model)
    with replaceable.recording():
        model(IDS)
    replaceable.replace(Setting(blocks(4, 32), blocks(8, 32), {"down_proj": FP16}))
    errors = replaceable.errors()
    assert max(errors["down_proj"]) == 0 < errors["lm_head"][0] < 0.02 < min(errors["q_proj"])


def test_mean_squares_are_those_of_what_a_layer_reads(model: LlamaForCausalLM) -> None:
    read, seen = [], []

    def restore(values: torch.Tensor, mean_squares: torch.Tensor) -> torch.Tensor:
        seen.append(mean_squares)
        return values

    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0][0]))
    replaceable = Replaceable(model)
    with replaceable.weighing(ALIKE):
        model(IDS)
        model(IDS[:, :7])
    for source in (ALIKE, UNIFORM):
        replaceable.replace(Setting(FP16, FP16, {"down_proj": Form("spy", restore, FP16.size, source)}))
    assert torch.allclose(seen[1], torch.cat(read).square().mean(0))
    assert torch.equal(seen[3], torch.ones(192))


def test_weighted_forms_round_by_what_layers_read() -> None:
    values = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    mean_squares = torch.logspace(-2, 2, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(1))]
    errors = [
        (mean_squares * (form.restore(values, mean_squares) - values).square()).sum()
        for form in (weighted(32), blocks(4, 32))
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_bits_a_weight_are_those_of_a_bundle(target) -> None:
    decoder = load_recipe("llava-1.5-7b").model.decoder
    shapes = decoder_linear_shapes(decoder)
    weights = sum(rows * columns for rows, columns in shapes)
    found = Setting(blocks(4, 128), FP16).bits_a_weight({"all": shapes, "lm_head": [(32000, 4096)]}, target)
    assert found == 8 * linear_bytes(shapes, 4, 128, {"cpu": 4, "cuda": 2}[target]) / weights
    assert found == pytest.approx(4 + (4 + {"cpu": 32, "cuda": 16}[target]) / 128)
    mixed = Setting(blocks(4, 128), FP16, {"half": blocks(8, 128)})
    halves = {"all": shapes, "half": shapes}
    assert mixed.bits_a_weight(halves, "cpu") == pytest.approx((4 + 36 / 128 + 8 + 40 / 128) / 2)


def test_text_is_scored_token_by_token(model: LlamaForCausalLM) -> None:
    losses, best = read_text(model, torch.stack([IDS[0], IDS[0] + 50]))
    assert losses.shape == best.shape == (78,)
    assert torch.equal(best[:39], model(IDS).logits[0, :-1].argmax(-1))
    model.lm_head.weight.zero_()
    losses, _ = read_text(model, IDS)
    assert losses.mean().exp() == pytest.approx(96)


def test_a_change_is_paired() -> None:
    losses = torch.linspace(0, 10, 100)
    assert change(losses + math.log(1.05), losses) == "+5.0 ± 0.0 %"
    noise = torch.tensor([0.1, -0.1]).repeat(50)
    assert change(losses + noise, losses) == "+0.0 ± 1.0 %"


def test_the_first_setting_is_what_the_others_are_compared_with() -> None:
    assert SETTINGS[0] == Setting(FP16, FP16)
    names = [(setting.name, setting.lm_head.name) for setting in SETTINGS]
    assert len(set(names)) == len(names)


def test_a_row_compares_with_fp16_and_with_the_right_answers(tmp_path) -> None:
    questions = [
        ("what shape?", "circle", "easy-VQA"),
        ("what color?", "red", "easy-VQA"),
        ("how many?", "3", "scenes, count"),
    ]

    def outcome(setting: Setting, loss: float, best: list[int], answers: list[str], error: float) -> Outcome:
        errors = {name: {kind: (error, 2 * error) for kind in KINDS} for name in ("SmolLM2", "vz-demo")}
        return Outcome(setting, errors, torch.full((4,), loss), torch.tensor(best), answers)

    fp16 = outcome(SETTINGS[0], 1.0, [1, 2, 3, 4], ["circle", "blue", "3"], 0.0)
    four = outcome(Setting(blocks(4, 128), blocks(8, 128)), 1.1, [1, 2, 3, 5], ["circle", "red", "2"], 0.04)
    asked = [Asked(None, questions)]  # type: ignore[arg-type]
    found = row(four, fp16, asked, layer_shapes("llava-1.5-7b"))
    assert found == {
        "layers": "RTN 4 bits/128",
        "lm_head": "RTN 8 bits/128",
        "bits a weight, CPU": "4.28",
        "bits a weight, CUDA": "4.16",
        "SmolLM2: error of a layer": "6.0 %",
        "perplexity": "3.004",
        "change": "+10.5 ± 0.0 %",
        "same token": "75.0 %",
        "vz-demo: error of a layer": "6.0 %",
        "easy-VQA right": "100.0 %",
        "scenes right": "0.0 %",
        "same answer": "33.3 %",
    }
    Report("layers", "Layers", 0.0, [], layer_rows([fp16, four])).write(tmp_path)
    assert "| vz-demo | RTN 4 bits/128 | RTN 8 bits/128 | 6 % (4–8) |" in (tmp_path / "layers.md").read_text()
