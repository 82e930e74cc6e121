"""What is said to somebody who gives something else where a bundle's folder is expected."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.test_cli import vz_edge
from tests.device import standin
from vz_edge.bundle import MANIFEST, read_manifest
from vz_edge.device.model import EdgeModel
from vz_edge.errors import BundleError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``street``, a bundle, ``bundles/llava-1.5-7b``, another, and other things."""
    monkeypatch.chdir(tmp_path)
    standin.write_bundle(tmp_path / "street")
    (tmp_path / "bundles").mkdir()
    shutil.copytree(tmp_path / "street", tmp_path / "bundles" / "llava-1.5-7b")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    (tmp_path / "street" / "language_model").mkdir()
    for name in ("street.tar.gz", "picture.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    return tmp_path


SAID = {
    "llava-next-13b": "is a recipe's name; export it first (vz-edge export --model llava-next-13b) and give bundles/",
    "llava-1.5-7b": "is a recipe's name; its bundle is bundles/llava-1.5-7b",
    "llava-next-13": "if you mean the recipe llava-next-13b, export it first",
    "llava-hf/llava-1.5-7b-hf": "is a hub id, export it first: vz-edge export --model llava-hf/llava-1.5-7b-hf",
    f"street/{MANIFEST}": "is a part of the bundle street; give street",
    "street/decoder.onnx": "is a part of the bundle street; give street",
    "street/language_model": "is a part of the bundle street; give street",
    "streets": "did you mean street?",
    "bundles": "it holds bundles; give one of them: bundles/llava-1.5-7b",
    "checkpoint": "it is a checkpoint; export it first: vz-edge export --model checkpoint",
    "street.tar.gz": "is a file, expected a bundle's folder; unpack it",
    "picture.png": "is a file, expected a bundle's folder; expected what 'vz-edge export' wrote",
    "empty": "expected a folder written by 'vz-edge export'",
    "/nowhere/at/all": "does not exist; expected a folder written by 'vz-edge export'",
    "https://example.org/models/street": "https://example.org/models/street is an address",
    "hf://llava-hf/llava-1.5-7b-hf": "hf://llava-hf/llava-1.5-7b-hf is an address",
    "": "it holds bundles; give one of them: street",
}


@pytest.mark.parametrize("given", SAID)
def test_what_is_no_bundle_is_named_with_what_to_do(here: Path, given: str) -> None:
    with pytest.raises(BundleError) as raised:
        read_manifest(Path(given))
    assert SAID[given] in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(BundleError) as loaded:
        EdgeModel.load(given)
    assert str(loaded.value) == str(raised.value)


@pytest.mark.parametrize("command", ["run", "verify", "serve", "profile"])
def test_every_command_that_takes_a_bundle_says_it(here: Path, command: str) -> None:
    for given in ("llava-next-13b", f"street/{MANIFEST}", "https://example.org/models/street"):
        done = vz_edge(command, given)
        assert done.returncode == 2 and SAID[given] in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("given", ["nul\0byte", "n" * 5000, "b/" + "n" * 5000])
def test_what_is_no_path_at_all_is_no_bundle(here: Path, given: str) -> None:
    with pytest.raises(BundleError):
        read_manifest(Path(given))
