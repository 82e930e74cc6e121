"""Checkpoints that differ in what their files say: the bundle answers with transformers' tokens, in both formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.tiny import make_checkpoint
from vz_edge.bundle import read_manifest
from vz_edge.device.model import EdgeModel
from vz_edge.device.vision import Vision
from vz_edge.errors import CheckpointError, ExportError, UnsupportedModelError
from vz_edge.host.export import ExportRequest, SilentProgress, plan_export, write_bundle

SMALL = np.random.default_rng(0).integers(0, 256, (9, 20, 3), dtype=np.uint8)
PICTURE = Image.fromarray(SMALL).resize((160, 70), 3)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def exported(checkpoint: Path, out: Path, **options: Any) -> EdgeModel:
    request = ExportRequest(str(checkpoint), out, **{"bits": 16, "tokens": "all"} | options)
    write_bundle(plan_export(request), SilentProgress())
    return EdgeModel.load(out)


def transformers_ids(checkpoint: Path, count: int) -> list[int]:
    """Greedy token ids in float32."""
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    inputs = processor(images=[PICTURE], text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0]
    return ids[inputs["input_ids"].shape[1] :].tolist()


def assert_same_answer(checkpoint: Path, out: Path, count: int = 6) -> EdgeModel:
    model = exported(checkpoint, out)
    assert list(model.ask(PICTURE, "What?", max_new_tokens=count).token_ids) == transformers_ids(checkpoint, count)
    return model


@pytest.mark.parametrize(
    ("options", "format_version"),
    [
        ({"whole": {"multimodal_projector_bias": False}}, 4),
        ({"whole": {"vision_feature_select_strategy": "full"}}, 4),
        ({"whole": {"vision_feature_layer": [-1, 1]}}, 4),
        ({"whole": {"vision_feature_layer": [-3]}}, 3),
        ({"family": "llava_next", "whole": {"vision_feature_layer": [1, -2]}}, 4),
        ({"text": {"rope_parameters": YARN | {"rope_theta": 1e4}}}, 3),
        ({"decoder": "qwen2", "text": {"hidden_size": 80}}, 3),
    ],
    ids=str,
)
def test_variants_answer_as_transformers(tmp_path: Path, options: dict[str, Any], format_version: int) -> None:
    make_checkpoint(tmp_path / "checkpoint", **{"family": "llava"} | options)
    if options.get("whole", {}).get("vision_feature_select_strategy") == "full":
        edit(tmp_path / "checkpoint/processor_config.json", lambda c: c.update(vision_feature_select_strategy="full"))
    model = assert_same_answer(tmp_path / "checkpoint", tmp_path / "bundle")
    assert model.manifest.format_version == read_manifest(tmp_path / "bundle").format_version == format_version


def test_a_head_of_its_own_wins_over_a_config_that_says_tied(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    edit(tmp_path / "checkpoint/config.json", lambda c: c["text_config"].update(tie_word_embeddings=True))
    model = assert_same_answer(tmp_path / "checkpoint", tmp_path / "bundle")
    assert not model.manifest.model.decoder.tie_word_embeddings


def test_a_head_that_is_the_token_table_is_tied(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_checkpoint(tmp_path / "checkpoint", text={"tie_word_embeddings": True})
    file = tmp_path / "checkpoint/model.safetensors"
    tensors = load_file(file)
    table = next(value for name, value in tensors.items() if name.endswith("embed_tokens.weight"))
    save_file(tensors | {"lm_head.weight": table.clone()}, file, metadata={"format": "pt"})
    assert plan_export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "b")).model.decoder.tie_word_embeddings


def test_the_section_that_transformers_5_writes_wins_over_the_older_file(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    make_checkpoint(checkpoint)
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    nested = settings | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    edit(checkpoint / "processor_config.json", lambda c: c.update(image_processor=nested))
    model = assert_same_answer(checkpoint, tmp_path / "bundle")
    assert model.manifest.image.mean == (0.5,) * 3 and model.manifest.format_version == 3
    assert json.loads((tmp_path / "bundle/preprocessor_config.json").read_text()) == nested


def test_an_original_checkpoint_pads_as_its_config_says(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", layout="original")
    model = exported(tmp_path / "checkpoint", tmp_path / "bundle")
    assert model.manifest.image.mode == "pad"
    edit(tmp_path / "checkpoint/config.json", lambda c: c.update(image_aspect_ratio="square"))
    assert plan_export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "b")).image.mode == "stock"
    asked = ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "b", image_mode="pad")
    assert plan_export(asked).image.mode == "pad"


def test_cls_patch_of_the_original_code_is_transformers_full(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", layout="original")
    edit(tmp_path / "checkpoint/config.json", lambda c: c.update(mm_vision_select_feature="cls_patch"))
    model = exported(tmp_path / "checkpoint", tmp_path / "bundle")
    assert model.ask(PICTURE, "What?", max_new_tokens=1).image_tokens == 37


@pytest.mark.parametrize(
    "whole", [{"vision_feature_layer": [-2, 1]}, {"vision_feature_select_strategy": "full"}], ids=str
)
def test_variants_see_alike_in_onnx_runtime_and_in_torch(tmp_path: Path, whole: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    make_checkpoint(tmp_path / "checkpoint", whole=whole | {"multimodal_projector_bias": False})
    for name, tokens in (("all", "all"), ("some", "12")):
        exported(tmp_path / "checkpoint", tmp_path / name, format="bnb", bits=8, tokens=tokens)
        visions: list[Vision] = [EdgeModel.load(tmp_path / name, vision=kind).vision for kind in ("onnx", "torch")]
        found, expected = (vision.encode(vision.tile(PICTURE)).features for vision in visions)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_yarn_with_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    make_checkpoint(tmp_path / "checkpoint", text={"rope_parameters": YARN | {"rope_theta": 1e4}})
    model = exported(tmp_path / "checkpoint", tmp_path / "bundle", format="bnb", bits=8)
    assert model.manifest.parity.decoder is not None and model.manifest.parity.decoder.relative_error < 0.05
    config = json.loads((tmp_path / "bundle/language_model/config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn" and config["rope_parameters"]["factor"] == 4.0


@pytest.mark.parametrize(
    ("file", "changes", "error", "message"),
    [
        ("generation_config.json", {"repetition_penalty": 1.2}, UnsupportedModelError, "repetition_penalty 1.2"),
        ("generation_config.json", {"eos_token_id": "</s>"}, CheckpointError, "eos_token_id is '</s>'"),
        ("processor_config.json", {"image_token": "<picture>"}, UnsupportedModelError, "image_token '<picture>'"),
        ("tokenizer_config.json", {"image_token": "<picture>"}, UnsupportedModelError, "image_token '<picture>'"),
        ("preprocessor_config.json", {"do_resize": "yes"}, CheckpointError, "do_resize is 'yes'"),
        (
            "config.json",
            {"text_config": {"rope_scaling": {"type": "dynamic", "factor": 2.0}}},
            UnsupportedModelError,
            "dynamic",
        ),
    ],
)
def test_what_a_file_says_and_nothing_here_does_is_refused_by_the_plan(
    tmp_path: Path, file: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    edit(tmp_path / "checkpoint" / file, lambda c: c.update(changes))
    with pytest.raises(error, match=message) as caught:
        plan_export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "bundle"))
    assert "\n" not in str(caught.value)


def test_padding_is_refused_where_a_grid_pads(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", "llava_next")
    with pytest.raises(ExportError, match="--image-mode pad does not apply"):
        plan_export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "bundle", image_mode="pad"))


def test_unknown_fields_are_named_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    assert not caplog.records
    plan_export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "bundle"))
    assert not caplog.records
    edit(tmp_path / "checkpoint/config.json", lambda c: c.update(novelty=1))
    plan_export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "bundle"))
    assert "config.json: novelty" in caplog.text
