import dataclasses
import json
import re
from pathlib import Path

import pytest

from vz_edge.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    READABLE_VERSIONS,
    ImageSpec,
    Manifest,
    Parity,
    StopSpec,
    default_weights,
    read_manifest,
    verify_files,
    write_manifest,
)
from vz_edge.errors import BundleError, BundleVersionError, CorruptBundleError
from vz_edge.recipe import load_recipe
from vz_edge.staging import staged_folder


def ignore(*_: object) -> None:
    pass


def manifest() -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        created_by="vz-edge test",
        name="model",
        checkpoint="owner/model",
        model=load_recipe("llava-next-13b").model,
        target="cpu",
        budget=None,
        weights=default_weights(4),
        image=ImageSpec("stock", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        stop=StopSpec((2,), ()),
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    with staged_folder(tmp_path / "bundle", force=False) as staging:
        (staging / "weights.data").write_bytes(bytes(range(256)) * 10)
        (staging / "decoder.onnx").write_bytes(b"graph")
        write_manifest(staging, manifest(), ignore)
    return tmp_path / "bundle"


def test_what_was_written_is_what_is_read(bundle: Path) -> None:
    found = read_manifest(bundle)
    assert dataclasses.replace(found, files={}) == manifest()
    assert {name: entry.size_bytes for name, entry in found.files.items()} == {"decoder.onnx": 5, "weights.data": 2560}
    verify_files(bundle, found, ignore)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_bundle_of_the_first_format_is_read_as_onnx(bundle: Path) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    del data["format"]
    (bundle / MANIFEST).write_text(json.dumps(data | {"format_version": 1}))
    assert read_manifest(bundle).format == "onnx"


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("image", {"short_edge": 400}),
        ("image", {"exact_size": (336, 336)}),
        ("image", {"resize": False}),
        ("model", {"feature_layers": (-2, -5)}),
        ("model", {"cls_is_token": True}),
        ("model", {"projector_bias": False}),
    ],
)
def test_a_bundle_that_an_older_device_would_misread_is_of_format_4(tmp_path: Path, part: str, changes: dict) -> None:
    usual = manifest()
    changed = dataclasses.replace(usual, **{part: dataclasses.replace(getattr(usual, part), **changes)})
    (tmp_path / "decoder.onnx").write_bytes(b"graph")
    written = write_manifest(tmp_path, changed, ignore)
    assert written.format_version == 4 and read_manifest(tmp_path) == written
    assert set(json.loads((tmp_path / MANIFEST).read_text())[part]) & {"short_edge", "resize", "cls_is_token"} <= set(
        changes
    )


def test_keys_of_format_4_are_not_written_where_they_have_their_defaults(bundle: Path) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    assert data["format_version"] == 3
    assert set(data["image"]) == {"mode", "mean", "std", "rescale_factor", "resample"}
    assert not {"feature_layers", "cls_is_token", "projector_bias"} & set(data["model"])


def test_files_in_subfolders_are_listed_and_checked(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "bundle", force=False) as staging:
        (staging / "language_model").mkdir()
        (staging / "language_model" / "config.json").write_bytes(b"{}")
        write_manifest(staging, dataclasses.replace(manifest(), format="bnb"), ignore)
    assert read_manifest(tmp_path / "bundle").files.keys() == {"language_model/config.json"}
    (tmp_path / "bundle" / "language_model" / "config.json").write_bytes(b"[]")
    with pytest.raises(CorruptBundleError, match=r"config\.json has SHA-256"):
        verify_files(tmp_path / "bundle", read_manifest(tmp_path / "bundle"), ignore)


def test_a_changed_byte_is_found_by_its_file(bundle: Path) -> None:
    data = bytearray((bundle / "weights.data").read_bytes())
    data[100] ^= 1
    (bundle / "weights.data").write_bytes(data)
    with pytest.raises(CorruptBundleError, match=r"weights\.data has SHA-256"):
        verify_files(bundle, read_manifest(bundle), ignore)


def test_a_missing_or_shortened_file_is_found_on_reading(bundle: Path) -> None:
    (bundle / "weights.data").write_bytes(b"short")
    with pytest.raises(CorruptBundleError, match=r"weights\.data has 5 bytes, the manifest says 2560"):
        read_manifest(bundle)
    (bundle / "weights.data").unlink()
    with pytest.raises(CorruptBundleError, match=r"weights\.data is missing"):
        read_manifest(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": 1}', '{"format_version": 1, "nam": 2}'])
def test_a_broken_manifest_is_corrupt(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(CorruptBundleError, match="export the bundle again"):
        read_manifest(bundle)


def test_a_newer_format_is_refused_with_both_versions(bundle: Path) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    newest = max(READABLE_VERSIONS)
    data["format_version"] = newest + 1
    (bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleVersionError, match=f"format {newest + 1}.*reads up to format {newest}"):
        read_manifest(bundle)


@pytest.mark.parametrize("version", [str(FORMAT_VERSION), float(FORMAT_VERSION), True, None, 0, []], ids=repr)
def test_what_is_no_version_is_corrupt_and_not_too_new(bundle: Path, version: object) -> None:
    change(bundle, format_version=version)
    message = rf"format_version: expected an int from 1, got {re.escape(repr(version))}; export the bundle again"
    with pytest.raises(CorruptBundleError, match=message):
        read_manifest(bundle)


def test_a_format_whose_language_model_is_not_there_is_corrupt(bundle: Path) -> None:
    change(bundle, format="bnb")
    with pytest.raises(CorruptBundleError, match=r"'bnb' and lists no language_model/config\.json, which"):
        read_manifest(bundle)
    change(bundle, format="onnx", files={})
    with pytest.raises(CorruptBundleError, match=r"'onnx' and lists no decoder\.onnx, which"):
        read_manifest(bundle)


def test_what_was_compared_is_read_as_strictly_as_the_rest(bundle: Path) -> None:
    for parity in ({}, {"vision": None, "decoder": None}):
        change(bundle, parity=parity)
        assert read_manifest(bundle).parity == Parity()
    for parity, message in (
        ({"vision": {}}, "parity.vision.tiles: missing"),
        ({"vision": 3}, "parity.vision: expected a mapping, got int"),
        ({"decoder": {"layers": 2, "output": "logits", "relative_error": 0.1}}, "parity.decoder.top_token: missing"),
    ):
        change(bundle, parity=parity)
        with pytest.raises(CorruptBundleError, match=f"{message}; export the bundle again"):
            read_manifest(bundle)


def change(bundle: Path, **values: object) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_no_bundle_is_told_from_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        read_manifest(tmp_path)
    with pytest.raises(BundleError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")
