"""A bundle's language model that is not the manifest's: named before a weight is read, whatever was changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_checkpoint
from vz_edge.backends.language_model_files import (
    INDEX,
    check_language_model,
    plain_tensors,
    quantized_tensors,
    stored_tensors,
)
from vz_edge.bundle import FORMAT_VERSION, ImageSpec, Manifest, StopSpec, bitsandbytes_weights
from vz_edge.errors import CorruptBundleError
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.families import spec_from_config

pytest.importorskip("bitsandbytes")
from vz_edge.host.bnb import write_language_model

SHARD = "model-00001-of-00001.safetensors"
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@dataclasses.dataclass(frozen=True)
class Written:
    """A language model in ``folder``, and the manifest that belongs to it."""

    folder: Path
    manifest: Manifest

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.folder, folder))


def write(folder: Path, decoder: Any, bits: Any, **text: object) -> Written:
    make_checkpoint(folder / "checkpoint", decoder=decoder, text=text)
    checkpoint = Checkpoint.open(folder / "checkpoint")
    spec = spec_from_config(checkpoint.config)
    write_language_model(checkpoint, spec.decoder, bits, "cpu", (2,), folder / "language_model", lambda *_: None)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created_by="test",
        name="tiny",
        checkpoint="tiny",
        model=spec,
        target="cpu",
        budget=None,
        weights=bitsandbytes_weights(bits),
        image=ImageSpec("stock", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        stop=StopSpec((2,), ()),
        format="bnb",
    )
    return Written(folder / "language_model", manifest)


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("nf4"), "mistral", 4)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("int8"), "mistral", 8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("decoder", "tied"), [("llama", True), ("qwen2", False)])
def test_what_an_export_writes_is_what_is_expected(tmp_path: Path, decoder: str, tied: bool, bits: int) -> None:
    written = write(tmp_path, decoder, bits, tie_word_embeddings=tied)
    check_language_model(written.folder, written.manifest)
    spec = written.manifest.model.decoder
    expected = dict(plain_tensors(spec)) | dict(quantized_tensors(spec, bits))
    unchecked = ("quant_map", "quant_state.bitsandbytes__nf4", "weight_format")  # tables and notes of bitsandbytes' own
    stored = {name: shape for name, shape in stored_tensors(written.folder).items() if not name.endswith(unchecked)}
    assert stored == expected


def test_bundles_that_were_mixed_are_refused(nf4: Written, int8: Written, tmp_path: Path) -> None:
    with pytest.raises(CorruptBundleError, match=r"config\.json says bits 8 and the manifest 4: they do not belong"):
        check_language_model(int8.folder, nf4.manifest)
    with pytest.raises(CorruptBundleError, match="says bits 4 and the manifest 8"):
        check_language_model(nf4.folder, int8.manifest)
    other = write(tmp_path / "type", "llama", 4)
    with pytest.raises(CorruptBundleError, match="says model_type 'llama' and the manifest 'mistral'"):
        check_language_model(other.folder, nf4.manifest)
    deeper = write(tmp_path / "layers", "mistral", 4, num_hidden_layers=3)
    with pytest.raises(CorruptBundleError, match="says num_hidden_layers 3 and the manifest 2"):
        check_language_model(deeper.folder, nf4.manifest)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 2), ("num_key_value_heads", 4), ("vocab_size", 500), ("quantization_config", [])],
)
def test_an_edited_config_is_refused(nf4: Written, tmp_path: Path, key: str, value: Any) -> None:
    folder = nf4.copy(tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    said = "bits 16" if key == "quantization_config" else f"{key} {value}"
    with pytest.raises(CorruptBundleError, match=rf"config\.json says {said} and the manifest"):
        check_language_model(folder, nf4.manifest)


@pytest.mark.parametrize(
    ("bits", "change", "said"),
    [
        (4, lambda tensors: tensors.pop("model.norm.weight"), r"norm\.weight is missing"),
        (4, lambda tensors: tensors.pop(f"{WEIGHT}.absmax"), r"up_proj\.weight\.absmax is missing"),
        (8, lambda tensors: tensors.pop(WEIGHT.replace("weight", "SCB")), r"up_proj\.SCB is missing"),
        (4, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:7]}), r"shape \[7, 1\], expected \[16384, 1\]"),
        (8, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:7]}), r"shape \[7, 128\], expected \[256, 128\]"),
    ],
)
def test_other_tensors_are_refused(
    nf4: Written, int8: Written, tmp_path: Path, bits: int, change: Callable[[dict[str, torch.Tensor]], Any], said: str
) -> None:
    written = nf4 if bits == 4 else int8
    folder = written.copy(tmp_path / "copy")
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SHARD)
    with pytest.raises(CorruptBundleError, match=rf"{said}; copy or export the bundle again"):
        check_language_model(folder, written.manifest)


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:40])])
def test_files_that_are_missing_or_cut_off_are_named(
    nf4: Written, tmp_path: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    folder = nf4.copy(tmp_path / "copy")
    damage(folder / name)
    with pytest.raises(CorruptBundleError, match=rf"{name} cannot be read as .*; copy or export the bundle again"):
        check_language_model(folder, nf4.manifest)


def test_a_bundle_without_the_folder_is_refused(nf4: Written, tmp_path: Path) -> None:
    with pytest.raises(CorruptBundleError, match=r"nowhere/config\.json cannot be read.*No such file.*export"):
        check_language_model(tmp_path / "nowhere", nf4.manifest)


def test_what_lies_beside_is_no_harm(nf4: Written, tmp_path: Path) -> None:
    folder = nf4.copy(tmp_path / "copy")
    save_file({"extra": torch.zeros(3)}, folder / "model-00002-of-00002.safetensors")
    check_language_model(folder, nf4.manifest)
