"""The byte arithmetic against bundles that were really written.

At these widths what lies in the .onnx file itself (tensors of some bytes) is up to 3% of a part.
"""

from pathlib import Path

import pytest

from tests.tiny import make_checkpoint
from vz_edge.bundle import default_weights, read_manifest
from vz_edge.host.export import ExportRequest, SilentProgress, plan_export, write_bundle
from vz_edge.planning.memory import bundle_bytes
from vz_edge.recipe import load_recipe


@pytest.mark.parametrize(
    ("bits", "vision_bits", "target"), [(4, 16, "cpu"), (8, 8, "cpu"), (16, 16, "cuda"), (4, 16, "cuda")]
)
def test_prediction_is_what_is_written(tmp_path: Path, bits: int, vision_bits: int, target: str) -> None:
    make_checkpoint(tmp_path / "checkpoint", family="llava_next", decoder="mistral")
    request = ExportRequest(
        str(tmp_path / "checkpoint"),
        tmp_path / "bundle",
        bits=bits,
        vision_bits=vision_bits,
        target=target,
        tokens="all",
    )
    write_bundle(plan_export(request), SilentProgress())
    manifest = read_manifest(tmp_path / "bundle")
    predicted = bundle_bytes(manifest.model, manifest.weights, target)
    files = {name: entry.size_bytes for name, entry in manifest.files.items()}
    assert predicted["embedding"] == files["embedding.data"]
    assert predicted["vision"] == pytest.approx(files["vision.onnx.data"], rel=0.03)
    assert predicted["decoder"] + predicted["lm_head"] == pytest.approx(files["decoder.onnx.data"], rel=0.03)


def test_a_13b_at_4_bits_fits_the_published_bars() -> None:
    model = load_recipe("llava-next-13b").model
    assert sum(bundle_bytes(model, default_weights(4), "cpu").values()) < 8.7e9
    assert sum(bundle_bytes(model, default_weights(4), "cuda").values()) < 7.9e9
