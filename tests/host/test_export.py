"""The export as a whole: every layout gives the same bundle, and what cannot be done is refused with nothing left."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import safetensors.torch
import torch

from tests.tiny import make_checkpoint
from vz_edge.budget import TokenBudget
from vz_edge.bundle import read_manifest, verify_files
from vz_edge.errors import (
    BudgetError,
    CheckpointError,
    DiskSpaceError,
    ExportError,
    MissingTensorError,
    TensorShapeError,
)
from vz_edge.host import export, parity
from vz_edge.host.export import ExportRequest, SilentProgress, plan_export, write_bundle

FILES = {
    "chat_template.jinja",
    "decoder.onnx",
    "decoder.onnx.data",
    "embedding.data",
    "embedding.onnx",
    "genai_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vision.onnx",
    "vision.onnx.data",
    "vz_edge.json",
}


class Recorded:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[int, int]] = {}
        self._open = ""

    def start(self, stage: str, total_bytes: int) -> None:
        self._open = stage
        self.stages[stage] = (total_bytes, 0)

    def advance(self, item: str, size_bytes: int) -> None:
        total, done = self.stages[self._open]
        self.stages[self._open] = (total, done + size_bytes)


def exported(checkpoint: Path, out: Path, **options: Any) -> Path:
    write_bundle(plan_export(ExportRequest(str(checkpoint), out, **options)), Recorded())
    return out


def weights(bundle: Path, graph: str) -> dict[str, np.ndarray]:
    initializers = ir.load(bundle / graph).graph.initializers
    return {name: value.const_value.numpy() for name, value in initializers.items() if value.const_value is not None}


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_every_layout_gives_the_same_weights(tmp_path: Path, family: Any) -> None:
    bundles = {}
    for layout in ("new", "old", "original"):
        make_checkpoint(tmp_path / layout, family=family, layout=layout, shards=2)
        bundles[layout] = exported(tmp_path / layout, tmp_path / f"{layout}-bundle", dominant=10, contextual=2, bits=16)
        assert {path.name for path in bundles[layout].iterdir()} == FILES
    for graph in ("vision.onnx", "decoder.onnx"):
        expected = weights(bundles["new"], graph)
        for layout in ("old", "original"):
            found = weights(bundles[layout], graph)
            assert found.keys() == expected.keys()
            for name, array in found.items():
                # The original vocabulary has no row for the image token.
                np.testing.assert_array_equal(array, expected[name][..., : array.shape[-1]] if array.ndim else array)


def test_the_manifest_says_what_was_done(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", family="llava_next", decoder="qwen2")
    progress = Recorded()
    request = ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "bundle", bits=8, tokens="90")
    write_bundle(plan_export(request), progress)
    manifest = read_manifest(tmp_path / "bundle")
    verify_files(tmp_path / "bundle", manifest, lambda name, count: None)
    assert manifest.budget == TokenBudget(15, 3)
    assert (manifest.weights.bits, manifest.weights.lm_head_bits) == (8, 8)
    vision, decoder = manifest.parity.vision, manifest.parity.decoder
    assert vision is not None and decoder is not None
    assert vision.max_error < 1e-4 and vision.kept_agreement == 1.0
    assert 0 < decoder.relative_error < 0.1
    for stage in ("embedding", "vision", "decoder", "hashes"):
        total, done = progress.stages[stage]
        assert total == done > 0, stage


def test_four_bits_are_weighted_by_what_layers_read_unless_told_otherwise(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", family="llava_next")
    progress = Recorded()
    decoders = {}
    options = {"weighted": {"tokens": "90"}, "nearest": {"tokens": "90", "quantizer": "rtn"}, "fewer": {"tokens": "45"}}
    for name, given in options.items():
        request = ExportRequest(str(tmp_path / "checkpoint"), tmp_path / name, **given)  # type: ignore[arg-type]
        manifest = write_bundle(plan_export(request), progress if name == "weighted" else SilentProgress())
        assert manifest.weights.quantizer == ("rtn" if name == "nearest" else "weighted")
        decoders[name] = weights(tmp_path / name, "decoder.onnx")
    total, done = progress.stages["calibration"]
    assert total == done > 0
    for name, array in decoders["weighted"].items():
        np.testing.assert_array_equal(array, decoders["fewer"][name])  # whatever pictures keep
        if name.endswith(".scales"):
            assert not np.array_equal(array, decoders["nearest"][name]), name


def test_nothing_is_calibrated_where_nothing_is_quantised(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    progress = Recorded()
    request = ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "bundle", bits=16, quantizer="weighted")
    write_bundle(plan_export(request), progress)
    assert "decoder" in progress.stages and "calibration" not in progress.stages


def test_quantised_vision_says_what_it_changed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", family="llava_next")
    bundle = exported(tmp_path / "checkpoint", tmp_path / "bundle", tokens="90", vision_bits=8)
    vision = read_manifest(bundle).parity.vision
    assert vision is not None and vision.kept_agreement is not None
    assert 0.5 < vision.kept_agreement <= 1.0
    assert 0 < vision.max_error < 1


def test_fp16_for_cuda_is_close_to_torch_too(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", family="llava_next")
    bundle = exported(tmp_path / "checkpoint", tmp_path / "bundle", tokens="90", target="cuda", bits=16)
    record = read_manifest(bundle).parity
    assert record.vision is not None and record.decoder is not None
    assert (record.vision.kept_agreement or 0) > 0.9
    assert record.decoder.relative_error < 0.01


def test_only_the_first_layers_of_a_large_decoder_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "WHOLE_DECODER_ELEMENTS", 0)
    monkeypatch.setattr(parity, "FIRST_LAYERS", 1)
    make_checkpoint(tmp_path / "checkpoint")
    record = read_manifest(exported(tmp_path / "checkpoint", tmp_path / "bundle", bits=16)).parity.decoder
    assert record is not None and record.layers == 1 and record.top_token is None
    assert record.relative_error < 1e-5


def test_a_bundle_that_disagrees_with_torch_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    honest = parity.reference.decoder_states
    monkeypatch.setattr(parity.reference, "decoder_states", lambda *args: -honest(*args))
    with pytest.raises(ExportError, match="differs from torch"):
        exported(tmp_path / "checkpoint", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_bundle_that_keeps_other_tokens_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    honest = parity.reference.tower_states

    def other_scores(*args: Any) -> Any:
        hidden, scores, keys = honest(*args)
        return hidden, -scores, keys

    monkeypatch.setattr(parity.reference, "tower_states", other_scores)
    with pytest.raises(ExportError, match="of the positions that torch keeps"):
        exported(tmp_path / "checkpoint", tmp_path / "bundle", dominant=10, contextual=2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "checkpoint")

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "build_decoder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        exported(tmp_path / "checkpoint", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_disk_space_is_checked_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    with pytest.raises(DiskSpaceError, match=r"needs [1-9]\d*\.\d MB and .* has 0\.0 MB free"):
        plan_export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "bundle"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_file_system_without_a_size_says_itself_that_it_cannot_be_written(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=r"/proc/bundle cannot be written \(.*\); choose an --out"):
        exported(tmp_path / "checkpoint", Path("/proc/bundle"))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    make_checkpoint(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(TensorShapeError, match=r"mlp\.\w+_proj\.weight has shape"):
        exported(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["linear_1.weight", "linear_2.weight", "linear_2.bias", "image_newline"])
def test_a_projector_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "checkpoint"
    make_checkpoint(checkpoint, family="llava_next")
    file = next(checkpoint.glob("*.safetensors"))
    tensors = safetensors.torch.load_file(file)
    key = next(key for key in tensors if key.endswith(name))
    tensors[key] = tensors[key][..., :-1].contiguous()
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(TensorShapeError, match=rf"{re.escape(name)} has shape .* expected \["):
        exported(checkpoint, tmp_path / "bundle", tokens="all")
    assert not (tmp_path / "bundle").exists()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    make_checkpoint(checkpoint)
    file = next(checkpoint.glob("*.safetensors"))
    tensors = {key: value for key, value in safetensors.torch.load_file(file).items() if "lm_head" not in key}
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(MissingTensorError, match=r"lm_head\.weight"):
        exported(checkpoint, tmp_path / "bundle")


def test_a_chat_template_of_the_text_model_is_not_taken(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    make_checkpoint(checkpoint)
    for name in ("processor_config.json", "chat_template.json"):
        (checkpoint / name).unlink(missing_ok=True)
    text_only = "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(text_only)
    tokenizer_config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | {"chat_template": text_only}))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        exported(checkpoint, tmp_path / "bundle")


def test_the_image_token_must_be_where_the_config_says(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    make_checkpoint(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["image_token_index"] = config["image_token_id"] = 7
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expects 7"):
        exported(checkpoint, tmp_path / "bundle")


def test_the_budget_defaults_to_a_ninth_of_the_tokens(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", family="llava_next")
    plan = plan_export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "bundle"))
    assert [budget.per_tile for budget in plan.budgets] == [plan.model.tower.patches // 9]
    with pytest.raises(BudgetError, match="nearest"):
        plan_export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "bundle", tokens="7"))


def test_segments_give_what_the_whole_file_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    from vz_edge.host import segments

    make_checkpoint(tmp_path / "checkpoint")
    bundle = exported(tmp_path / "checkpoint", tmp_path / "bundle", dominant=10, contextual=2)
    side = read_manifest(bundle).model.tower.image_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
    names = ["image_features", "kept"]
    whole = ort.InferenceSession(str(bundle / "vision.onnx")).run(names, {"pixel_values": pixels})
    for size in (1, 50_000, 10**9):
        monkeypatch.setattr(segments, "SEGMENT_BYTES", size)
        pieces = segments.run_in_segments(bundle / "vision.onnx", {"pixel_values": pixels}, names)
        torch.testing.assert_close(torch.tensor(pieces[0]), torch.tensor(whole[0]))
        np.testing.assert_array_equal(pieces[1], whole[1])
    assert not list(bundle.glob(".*"))
