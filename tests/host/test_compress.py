"""``vz_edge.compress``: the published numbers, the exported graph's numbers, and nothing else changed."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaModel, LlavaNextModel

import vz_edge
from tests.contract.junk import FIXED, settle
from tests.golden_cases import CHECKPOINTS, GOLDEN, NEAR_TIES, cases, golden_tiles, model_spec
from tests.host.compressing import (
    FAMILIES,
    TOTAL,
    Plain,
    features_by_hooks,
    inputs_of,
    pictures,
    tiles_of,
    tower_layers,
    vision_inputs,
)
from tests.tiny import make_checkpoint
from vz_edge import BudgetError, CompressionError, DependencyError, RequestError, UnsupportedModelError
from vz_edge.device.image import token_count
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.compressed_model import TILES_AT_ONCE
from vz_edge.host.families import spec_from_config
from vz_edge.host.vision_graph import build_vision


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.inference_mode()
def test_golden_positions_features_and_logits(name: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(GOLDEN / name).eval()
    processor = AutoProcessor.from_pretrained(GOLDEN / name)
    # The tower takes a second a picture, and test_select has every case: here each budget once and each picture once.
    pictures_of = len({case.image for case in cases(name)})
    for case in cases(name)[:: pictures_of + 1]:
        vz_edge.compress(model, processor, tokens=case.budget.total(model_spec(name).max_tiles))
        pixel_values = torch.from_numpy(golden_tiles(name, case.image)[0])
        arguments = {"pixel_values": pixel_values}
        if name == "llava-next":
            width, height = Image.open(case.folder / f"{case.image}.png").size
            arguments = {"pixel_values": pixel_values[None], "image_sizes": torch.tensor([[height, width]])}
        found = model.get_image_features(**arguments)
        np.testing.assert_array_equal(found.kept[0], case.kept)
        case.assert_features(found.pooler_output[0].numpy())
        ids = torch.tensor([[1, 5, *[model.config.image_token_id] * len(case.features), 7, 9]])
        logits = model(input_ids=ids, **arguments).logits[0, -1].numpy()
        error = np.abs(logits - case.last_logits).max() / np.abs(case.last_logits).max()
        assert error < (1e-3 if case.name in NEAR_TIES else 1e-4)
        vz_edge.restore(model)


@torch.inference_mode()
def test_equals_the_exported_vision_graph(plain: Plain, tmp_path: Path) -> None:
    model, processor = plain.compressed()
    budget = model.model.compression.budget
    graph = build_vision(Checkpoint.open(plain.folder), plain.spec, (budget,), ir.DataType.FLOAT, None)
    graph.save(tmp_path / "vision.onnx", lambda *_: None)
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx", providers=["CPUExecutionProvider"])

    def assert_equal(inputs: dict[str, Any], shown: list[tuple[torch.Tensor, int | None]]) -> None:
        found = model.get_image_features(**inputs)
        assert len(shown) == len(found.pooler_output)
        for features, kept, (values, columns) in zip(found.pooler_output, found.kept, shown, strict=True):
            feeds = {"pixel_values": values.numpy()} | ({} if columns is None else {"grid_width": np.array([columns])})
            expected_features, expected_kept = session.run(["image_features", "kept"], feeds)
            np.testing.assert_array_equal(kept, expected_kept)
            assert features.shape == expected_features.shape
            assert np.abs(features.numpy() - expected_features).max() <= 1e-5 * np.abs(expected_features).max()

    inputs = inputs_of(processor, 4)
    assert_equal(vision_inputs(inputs), tiles_of(inputs, plain))
    if plain.family == "llava_next":
        flat = torch.cat([values for values, _ in tiles_of(inputs, plain)])
        assert_equal({"pixel_values": flat, "image_sizes": inputs["image_sizes"]}, tiles_of(inputs, plain))
        one_tile = {"pixel_values": inputs["pixel_values"][:, :1], "image_sizes": inputs["image_sizes"]}
        assert_equal(one_tile, [(values, 1) for values in one_tile["pixel_values"]])  # the newline comes after it


@torch.inference_mode()
def test_only_the_layers_that_are_needed_run_and_with_fused_attention(
    plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = plain.compressed()
    fused = torch.nn.functional.scaled_dot_product_attention
    calls = []
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    query_rows: list[list[int]] = []
    for layer in tower_layers(model):
        rows: list[int] = []
        query_rows.append(rows)
        layer.self_attn.q_proj.register_forward_hook(lambda _m, _i, output, rows=rows: rows.append(output.shape[1]))
    inputs = vision_inputs(inputs_of(processor))
    times = math.ceil(sum(len(values) for values, _ in tiles_of(inputs, plain)) / TILES_AT_ONCE)
    model.get_image_features(**inputs)
    assert query_rows == [[37] * times, [37, 1] * times, []]
    assert len(calls) == 2 * times


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_half_precision(plain: Plain, dtype: torch.dtype) -> None:
    model, processor = plain.compressed()
    inputs = vision_inputs(inputs_of(processor, 4))
    exact = model.get_image_features(**inputs)
    found = model.to(dtype).get_image_features(**inputs)
    assert all(features.dtype == dtype for features in found.pooler_output)
    same = [np.isin(a, b).mean() for a, b in zip(torch.cat(exact.kept), torch.cat(found.kept), strict=True)]
    assert np.mean(same) > 0.9


class Opaque(torch.nn.Module):
    """A linear layer without a weight to read, as quantised ones have."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.run = [linear]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run[0](x)


@torch.inference_mode()
def test_no_weight_is_read(plain: Plain) -> None:
    model, processor = plain.compressed()
    inputs = vision_inputs(inputs_of(processor, 2))
    expected = model.get_image_features(**inputs).pooler_output
    for layer in tower_layers(model):
        for module in (layer.self_attn, layer.mlp):
            for name, linear in list(module.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(module, name, Opaque(linear))
    for found, wanted in zip(model.get_image_features(**inputs).pooler_output, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def logits(model: Any, processor: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs_of(processor, 2)).logits


def test_only_this_model_changes_and_restore_undoes_it(plain: Plain) -> None:
    methods = [LlavaModel.get_image_features, LlavaNextModel.get_image_features]
    expected = logits(plain.model, plain.processor)
    attributes = set(vars(plain.model.model))
    one, one_processor = plain.compressed()
    few_tokens = TOTAL[plain.family] // 2
    other, other_processor = plain.compressed(few_tokens)
    assert logits(one, one_processor).shape[1] > logits(other, other_processor).shape[1]
    assert torch.equal(logits(plain.model, plain.processor), expected)
    assert [LlavaModel.get_image_features, LlavaNextModel.get_image_features] == methods
    vz_edge.restore(one)
    assert set(vars(one.model)) == attributes
    assert torch.equal(logits(one, plain.processor), expected)
    assert other.model.compression.total == few_tokens


def test_twice_is_once_and_another_budget_is_refused(plain: Plain) -> None:
    model, processor = plain.compressed()
    expected = logits(model, processor)
    again = vz_edge.compress(model, processor, TOTAL[plain.family])
    assert torch.equal(logits(model, again), expected)
    with pytest.raises(CompressionError, match=rf"to {TOTAL[plain.family]} tokens already; vz_edge\.restore\(model\)"):
        vz_edge.compress(model, processor, TOTAL[plain.family] // 2)
    assert torch.equal(logits(model, processor), expected)
    vz_edge.restore(model)
    fewer = vz_edge.compress(model, processor, TOTAL[plain.family] // 2)  # of a compressed processor
    assert logits(model, fewer).shape[1] < expected.shape[1]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_compressed_and_independent(plain: Plain, how: Any) -> None:
    model, processor = plain.compressed()
    expected = logits(model, processor)
    copied, copied_processor = how(model), how(processor)
    vz_edge.restore(model)
    assert torch.equal(logits(copied, copied_processor), expected)


def test_a_model_that_is_let_go_is_freed_at_once(plain: Plain) -> None:
    model, processor = plain.compressed()
    logits(model, processor)
    reference = weakref.ref(model.model.language_model)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_saving_writes_the_plain_model_and_processor(plain: Plain, tmp_path: Path) -> None:
    model, processor = plain.compressed()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    plain.model.save_pretrained(tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    loaded_processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded_processor) is type(plain.processor)
    assert loaded_processor.to_dict() == plain.processor.to_dict() == processor.to_dict()
    assert torch.equal(logits(loaded, loaded_processor), logits(plain.model, plain.processor))
    again = vz_edge.compress(loaded, loaded_processor, TOTAL[plain.family])
    assert torch.equal(logits(loaded, again), logits(model, processor))


def test_the_given_processor_stays_as_it_is(plain: Plain) -> None:
    before = inputs_of(plain.processor)["input_ids"]
    _, processor = plain.compressed()
    processor.tokenizer.padding_side = "left"
    assert plain.processor.tokenizer.padding_side == "right"
    assert torch.equal(inputs_of(plain.processor)["input_ids"], before)


@settings(deadline=None, max_examples=60)
@given(size=st.tuples(st.integers(1, 900), st.integers(1, 900)))
def test_tokens_are_counted_as_on_a_device(plain: Plain, size: tuple[int, int]) -> None:
    compression = plain_compression(plain)
    assert compression.tokens(size[1], size[0]) == token_count(size, plain.spec, compression.budget)


def plain_compression(plain: Plain) -> Any:
    if not hasattr(plain, "compression"):
        plain.compression = plain.compressed()[0].model.compression  # type: ignore[attr-defined]
    return plain.compression


def test_the_processor_counts_alike_in_prompts_and_on_request(plain: Plain) -> None:
    _, processor = plain.compressed()
    shown = pictures()
    inputs = processor(images=shown, text=["<image>"] * len(shown), padding=True, return_tensors="pt")
    counted = (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    expected = [token_count(picture.size, plain.spec, plain_compression(plain).budget) for picture in shown]
    assert counted == expected
    sizes = [[picture.height, picture.width] for picture in shown]
    assert processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens == expected


def test_other_models_are_refused(plain: Plain, tmp_path: Path) -> None:
    expected = r"expected transformers' LlavaForConditionalGeneration or LlavaNextForConditional.*from_pretrained"
    for other in (torch.nn.Linear(1, 1), plain.model.model, "llava-hf/llava-1.5-7b-hf", None):
        with pytest.raises(UnsupportedModelError, match=f"^a model of class {type(other).__name__} .*{expected}"):
            vz_edge.compress(other, plain.processor)


@pytest.mark.parametrize(
    "whole",
    [
        {"vision_feature_layer": [-2, 1]},
        {"vision_feature_select_strategy": "full", "multimodal_projector_bias": False},
        {"vision_feature_layer": [-3], "vision_feature_select_strategy": "full"},
    ],
    ids=str,
)
def test_variants_of_the_projector_equal_the_exported_graph(tmp_path: Path, whole: dict[str, Any]) -> None:
    model: Any = make_checkpoint(tmp_path / "model", "llava", whole=whole)
    processor = vz_edge.compress(model, AutoProcessor.from_pretrained(tmp_path / "model"), TOTAL["llava"])
    inputs = inputs_of(processor, 2)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 2 * TOTAL["llava"]
    spec, budget = spec_from_config(model.config.to_dict()), model.model.compression.budget
    graph = build_vision(Checkpoint.open(tmp_path / "model"), spec, (budget,), ir.DataType.FLOAT, None)
    graph.save(tmp_path / "vision.onnx", lambda *_: None)
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx", providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        found = model.get_image_features(**vision_inputs(inputs))
    for features, kept, values in zip(found.pooler_output, found.kept, inputs["pixel_values"], strict=True):
        expected, expected_kept = session.run(["image_features", "kept"], {"pixel_values": values[None].numpy()})
        np.testing.assert_array_equal(kept, expected_kept)
        assert np.abs(features.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def test_other_configs_are_refused(plain: Plain) -> None:
    model = copy.deepcopy(plain.model)
    model.config.vision_feature_layer = [-2, -9]
    with pytest.raises(UnsupportedModelError, match="vision_feature_layer"):
        vz_edge.compress(model, plain.processor)
    model = copy.deepcopy(plain.model)
    model.config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(UnsupportedModelError, match=r"siglip_vision_model.*clip_vision_model"):
        vz_edge.compress(model, plain.processor)


@pytest.mark.parametrize("tokens", [None, "all", "60", 60.0, True])
def test_all_tokens_are_the_plain_model(plain: Plain, tokens: Any) -> None:
    model = copy.deepcopy(plain.model)
    with pytest.raises(BudgetError, match=r"expected a whole number \(int\).*was not compressed"):
        vz_edge.compress(model, plain.processor, tokens)
    assert set(vars(model.model)) == set(vars(plain.model.model))


def test_an_impossible_budget(plain: Plain) -> None:
    model = copy.deepcopy(plain.model)
    for tokens in (0, -5, 1000):
        with pytest.raises(BudgetError, match=rf"^tokens {tokens} is impossible .*nearest: \d+$"):
            vz_edge.compress(model, plain.processor, tokens)
    assert set(vars(model.model)) == set(vars(plain.model.model))


def test_arguments_of_wrong_types_change_nothing(plain: Plain) -> None:
    model = copy.deepcopy(plain.model)
    for make in FIXED:
        for name in ("tokens", "processor", "model"):
            given = {"model": model, "processor": plain.processor, "tokens": 12} | {name: make()}
            error = settle(lambda given=given: vz_edge.compress(**given))
            assert isinstance(error, vz_edge.VzEdgeError)
        assert isinstance(settle(lambda make=make: vz_edge.restore(make())), CompressionError)
    assert set(vars(model.model)) == set(vars(plain.model.model))


def test_another_models_processor_is_refused(plain: Plain, tmp_path: Path) -> None:
    model = copy.deepcopy(plain.model)
    other_family = next(family for family in FAMILIES if family != plain.family)
    stranger = Plain(tmp_path, other_family).processor
    with pytest.raises(CompressionError, match=rf"{type(stranger).__name__} does not belong.*AutoProcessor"):
        vz_edge.compress(model, stranger, TOTAL[plain.family])
    for other in (plain.processor.tokenizer, plain.processor.image_processor, None):
        with pytest.raises(CompressionError, match="does not belong to this model; expected a Llava"):
            vz_edge.compress(model, other, TOTAL[plain.family])
    for change in (
        lambda processor: setattr(processor, "image_processor", None),
        lambda processor: setattr(processor.image_processor, "crop_size", {"height": 56, "width": 56}),
        lambda processor: setattr(processor, "patch_size", 16),
        lambda processor: setattr(processor, "image_token_id", 7),
    ):
        processor = copy.deepcopy(plain.processor)
        change(processor)
        with pytest.raises(CompressionError, match=r"the processor's .* is .* and the model's .*: it is another"):
            vz_edge.compress(model, processor, TOTAL[plain.family])
    if plain.family == "llava_next":
        processor = copy.deepcopy(plain.processor)
        processor.image_processor.image_grid_pinpoints = [[84, 168]]
        with pytest.raises(CompressionError, match="image_grid_pinpoints"):
            vz_edge.compress(model, processor, TOTAL[plain.family])
    assert set(vars(model.model)) == set(vars(plain.model.model))


def test_prompts_and_pictures_that_do_not_match(plain: Plain) -> None:
    model, processor = plain.compressed()
    vanilla = inputs_of(plain.processor)
    with pytest.raises(RequestError, match=r"prompts hold \d+ image tokens and their pictures give \d+: .*compress"):
        model(**vanilla)
    with pytest.raises(RequestError, match=r"prompts hold"):
        model.generate(**vanilla, max_new_tokens=1)
    embeds = model.get_input_embeddings()(vanilla.pop("input_ids"))
    with pytest.raises(RequestError, match=r"prompts hold another number of image tokens"):
        model(inputs_embeds=embeds, **vanilla)
    inputs = inputs_of(processor)
    with pytest.raises(RequestError, match="vision_feature_layer -1: a compressed model reads"):
        model(**inputs, vision_feature_layer=-1)
    with pytest.raises(RequestError, match="vision_feature_select_strategy 'full'"):
        model(**inputs, vision_feature_select_strategy="full")
    if plain.family == "llava_next":
        inputs["pixel_values"] = inputs["pixel_values"][:, :2]
        with pytest.raises(RequestError, match=r"of shape \[1, 2, 3, 84, 84\] do not belong to image_sizes.*\[5\]"):
            model(**inputs)
        del inputs["image_sizes"]
        with pytest.raises(RequestError, match="pixel_values came without image_sizes"):
            model(**inputs)


def test_restoring_what_is_not_compressed(plain: Plain) -> None:
    for other in (plain.model, plain.model.model, plain.compressed()[1], torch.nn.Linear(1, 1), None):
        with pytest.raises(CompressionError, match="is not a compressed model, so there is nothing to restore"):
            vz_edge.restore(other)


def test_the_oracle_of_the_other_tests(plain: Plain) -> None:
    """A whole tower watched by hooks gives what compress gives."""
    model, processor = plain.compressed()
    inputs = inputs_of(processor, 4)
    with torch.inference_mode():
        found = model.get_image_features(**vision_inputs(inputs))
    for number, (values, columns) in enumerate(tiles_of(inputs, plain)):
        features, kept = features_by_hooks(plain.model, plain, values, columns)
        assert torch.equal(found.kept[number], kept)
        torch.testing.assert_close(found.pooler_output[number], features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_what_is_missing_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delitem(sys.modules, "vz_edge.host.compress", raising=False)  # whichever test came first
    monkeypatch.setitem(sys.modules, missing, None)
    for name in ("compress", "restore"):
        with pytest.raises(DependencyError, match=rf"needs torch and transformers 5 .*{missing}.*'transformers>="):
            getattr(vz_edge, name)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, vz_edge; print({'torch', 'transformers'} & set(sys.modules), 'compress' in dir(vz_edge))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set() True"
