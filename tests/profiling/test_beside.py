"""The prediction beside the measurement: for every kind of bundle, of the stages that are measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.device import standin
from vz_edge.bundle import Manifest, WeightSpec, bitsandbytes_weights, default_weights
from vz_edge.errors import DeviceError
from vz_edge.planning.devices import load_device
from vz_edge.planning.predict import predict
from vz_edge.profiling.beside import predict_bundle
from vz_edge.profiling.run import PlannedBundle
from vz_edge.profiling.run_report import STAGES, TIMES, Identity
from vz_edge.recipe import load_recipe

MODEL = load_recipe("llava-next-7b").model


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return standin.write_bundle(tmp_path_factory.mktemp("beside") / "bundle", budget=None)


def planned(manifest: Manifest, weights: WeightSpec, format_: str) -> PlannedBundle:
    """A bundle of all tokens of a 7B, as ``plan_run`` gives it."""
    changed = dataclasses.replace(manifest, model=MODEL, weights=weights, format=format_)  # type: ignore[arg-type]
    identity = Identity(manifest.name, "cuda", weights, None, ("CUDAExecutionProvider",))
    return PlannedBundle(Path("bundle"), changed, identity)


@pytest.mark.parametrize(
    ("weights", "format_"),
    [(default_weights(4), "onnx"), (bitsandbytes_weights(4), "bnb"), (bitsandbytes_weights(8), "bnb")],
)
def test_every_bundle_is_predicted_by_the_names_of_what_is_measured(
    manifest: Manifest, weights: WeightSpec, format_: str
) -> None:
    found = predict_bundle(planned(manifest, weights, format_), 16, load_device("rtx-4090-24"), 5, 70)
    assert set(found.times) == set(TIMES) - {"load_sec"}
    assert {"picture", "prefill"} <= set(found.memory) <= set(STAGES)
    assert found.peak_bytes == max(found.memory.values())


def test_a_bundle_with_bitsandbytes_weights_is_not_the_papers_code(manifest: Manifest) -> None:
    """The same weights in transformers: its tower runs a layer less and returns no attention, and its cache is one."""
    board, weights = load_device("rtx-4090-24"), bitsandbytes_weights(4)
    ours = predict_bundle(planned(manifest, weights, "bnb"), 16, board, 5, 70)
    theirs = predict(MODEL, weights, None, 5, board, "transformers", 70, 16)
    assert ours.times["vision_sec"] < theirs.vision_sec and ours.peak_bytes < theirs.memory.peak_bytes
    assert ours.times["decode_tokens_per_sec"] == pytest.approx(theirs.tokens_per_sec, rel=0.05)
    with pytest.raises(DeviceError, match="no figures of transformers on a device of class cpu"):
        predict_bundle(planned(manifest, weights, "bnb"), 16, load_device("cpu"))
