"""Checkpoints: every layout gives the same tensors under the same names, and every damage its own error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import TOWER_FOLDER, make_checkpoint, write_shards
from vz_edge.errors import CheckpointError, MissingTensorError, TensorShapeError, UnsafeCheckpointError
from vz_edge.host.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    make_checkpoint(folder, "llava_next", shards=3)
    return folder


@pytest.mark.parametrize("layout", ["new", "old", "saved", "original", "original_with_tower"])
def test_every_layout_gives_transformers_tensors_under_one_set_of_names(tmp_path: Path, layout: str) -> None:
    model = make_checkpoint(tmp_path / "model", "llava_next", layout=layout, shards=1 if layout == "saved" else 2)
    tower = tmp_path / TOWER_FOLDER if layout == "original" else None
    checkpoint = Checkpoint.open(tmp_path / "model", tower)
    expected = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    assert checkpoint.names() == sorted(expected)
    for name, value in expected.items():
        rows = checkpoint.shape(name)[0]  # the original vocabulary lacks the image token
        assert torch.equal(checkpoint.load(name), value[:rows]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_keep_the_dtype_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(3, 5).to(dtype)
    write_shards(tmp_path, {"lm_head.weight": values})
    (tmp_path / "config.json").write_text("{}")
    loaded = Checkpoint.open(tmp_path).load("lm_head.weight")
    assert loaded.dtype == dtype
    assert torch.equal(loaded, values)


def test_rows_are_read_alone(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    name = "language_model.layers.0.mlp.gate_proj.weight"
    weight, whole = checkpoint.weight(name, (256, 128)), checkpoint.load(name)
    for rows in (slice(0, 1), slice(5, 9), slice(250, 256), slice(250, 999), slice(None)):
        assert torch.equal(weight.load(rows), whole[rows])


def test_input_bytes_count_all_shards(folder: Path) -> None:
    assert Checkpoint.open(folder).input_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_wrong_shape_names_tensor_found_and_expected(folder: Path) -> None:
    with pytest.raises(TensorShapeError, match=r"image_newline has shape \[128\], expected \[64\]"):
        Checkpoint.open(folder).weight("image_newline", (64,))


def test_missing_tensor_is_named(folder: Path) -> None:
    with pytest.raises(MissingTensorError, match=r"no tensor language_model\.norm\.bias"):
        Checkpoint.open(folder).weight("language_model.norm.bias", (128,))


def test_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    copy = _copy(folder, tmp_path)
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MissingTensorError, match=r"1 of the 3 shards.*model-00002-of-00003\.safetensors"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("keep_bytes", [0, 4, 100, -1])
def test_truncated_shard_is_named_with_its_size(folder: Path, tmp_path: Path, keep_bytes: int) -> None:
    shard = _copy(folder, tmp_path) / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep_bytes])
    with pytest.raises(CheckpointError, match=f"model-00002-of-00003.safetensors.* {shard.stat().st_size} bytes"):
        Checkpoint.open(shard.parent)


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UnsafeCheckpointError, match=r"from_pretrained\(.*\)\.save_pretrained\("):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": "{"}, "cannot be read as JSON"),
        ({"config.json": "[]"}, "expected a JSON object"),
        ({"config.json": "{}"}, "neither model.safetensors.index.json nor model.safetensors"),
        ({"config.json": "{}", "model.safetensors": "x" * 100}, "cut off inside its header"),
        ({"config.json": "{}", "model.safetensors": "\2\0\0\0\0\0\0\0[]"}, "not a safetensors file"),
        ({"config.json": "{}", "model.safetensors.index.json": "{}"}, "weight_map"),
    ],
)
def test_unusable_folders_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_quantised_checkpoint_is_refused_when_read(tmp_path: Path) -> None:
    header = json.dumps({"lm_head.weight": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abcd")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has dtype F8_E4M3"):
        Checkpoint.open(tmp_path).load("lm_head.weight")


def _copy(folder: Path, target: Path) -> Path:
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/model.safetensors", "a/../../model.safetensors"])
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="not in its folder"):
        Checkpoint.open(tmp_path / "model")


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_checkpoint(folder, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file({"lm_head.weight": torch.zeros(2, 2)}, folder / "more.safetensors")
    index["weight_map"]["more"] = "more.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*expected each tensor once"):
        Checkpoint.open(folder)
