"""Vision in torch, from the weights in the vision graph: the graph's own features and positions."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from tests.host.compressing import pictures
from tests.tiny import make_checkpoint
from vz_edge.backends.graph_weights import read_weights
from vz_edge.backends.torch_vision import TorchVision
from vz_edge.budget import TokenBudget
from vz_edge.bundle import ImageSpec, Manifest, StopSpec, bitsandbytes_weights
from vz_edge.device import memory_check
from vz_edge.device.mapped import MappedWeights
from vz_edge.device.runtime import CPU
from vz_edge.device.vision import VisionEncoder
from vz_edge.errors import CorruptBundleError
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.families import spec_from_config
from vz_edge.host.vision_graph import build_vision

BUDGET = TokenBudget(10, 2)


@dataclass(frozen=True)
class Exported:
    """A folder with a vision graph, and the manifest that belongs to it."""

    folder: Path
    manifest: Manifest

    def in_torch(self) -> TorchVision:
        return TorchVision.open(self.folder, self.manifest, "cpu")

    def in_onnxruntime(self) -> VisionEncoder:
        return VisionEncoder.open(self.folder, self.manifest, [CPU], threads=1)


def export(folder: Path, family: str, budget: TokenBudget | None, target: str = "cpu", **vision: object) -> Exported:
    make_checkpoint(folder / "checkpoint", family, vision=vision)  # type: ignore[arg-type]
    checkpoint = Checkpoint.open(folder / "checkpoint")
    spec = spec_from_config(checkpoint.config)
    precision = ir.DataType.FLOAT if target == "cpu" else ir.DataType.FLOAT16
    budgets = () if budget is None else (budget,)
    build_vision(checkpoint, spec, budgets, precision, None).save(folder / "vision.onnx", lambda *_: None)
    manifest = Manifest(
        format_version=2,
        created_by="test",
        name="tiny",
        checkpoint="tiny",
        model=spec,
        target=target,  # type: ignore[arg-type]
        budget=budget,
        weights=bitsandbytes_weights(4),
        image=ImageSpec("stock", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        stop=StopSpec((2,), ()),
        format="bnb",
    )
    return Exported(folder, manifest)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tmp_path_factory.mktemp("vision"), "llava_next", BUDGET)


@pytest.mark.parametrize("budget", [BUDGET, None], ids=["budget", "all"])
@pytest.mark.parametrize(
    ("family", "vision"),
    [("llava", {}), ("llava_next", {}), ("llava_next", {"hidden_act": "gelu", "layer_norm_eps": 1e-3})],
    ids=["llava", "llava_next", "another tower"],
)
def test_positions_and_features_are_the_graphs(
    tmp_path: Path, family: str, budget: TokenBudget | None, vision: dict
) -> None:
    exported = export(tmp_path, family, budget, **vision)
    in_torch, in_onnxruntime = exported.in_torch(), exported.in_onnxruntime()
    for picture in pictures():
        tiles = in_torch.tile(picture)
        np.testing.assert_array_equal(tiles.pixel_values, in_onnxruntime.tile(picture).pixel_values)
        found, expected = in_torch.encode(tiles), in_onnxruntime.encode(tiles)
        assert (found.grid, found.original_size) == (expected.grid, expected.original_size)
        assert found.features.dtype == expected.features.dtype and found.features.shape == expected.features.shape
        assert np.abs(found.features - expected.features).max() <= 1e-5 * np.abs(expected.features).max()
        if budget is None:
            assert found.kept is None
        else:
            np.testing.assert_array_equal(found.kept, expected.kept)


def test_each_of_several_budgets_is_the_graphs(tmp_path: Path) -> None:
    budgets = (BUDGET, TokenBudget(5, 1))
    one = export(tmp_path, "llava_next", BUDGET)
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    build_vision(checkpoint, one.manifest.model, budgets, ir.DataType.FLOAT, None).save(
        tmp_path / "vision.onnx", lambda *_: None
    )
    exported = Exported(tmp_path, dataclasses.replace(one.manifest, more_budgets=budgets[1:]))
    in_torch, in_onnxruntime = exported.in_torch(), exported.in_onnxruntime()
    tiles = in_torch.tile(pictures()[0])
    for budget in (None, *budgets):
        found, expected = in_torch.encode(tiles, budget), in_onnxruntime.encode(tiles, budget)
        np.testing.assert_array_equal(found.kept, expected.kept)
        assert found.features.shape == ((budget or BUDGET).total(len(tiles.pixel_values)), 128)
        assert np.abs(found.features - expected.features).max() <= 1e-5 * np.abs(expected.features).max()


def test_a_graph_for_cuda_runs_in_float32_on_a_processor(tmp_path: Path) -> None:
    exported = export(tmp_path, "llava_next", None, target="cuda")
    in_torch = exported.in_torch()
    tiles = in_torch.tile(pictures()[0])
    found, expected = in_torch.encode(tiles).features, exported.in_onnxruntime().encode(tiles).features
    assert (found.dtype, expected.dtype) == (np.float32, np.float16)
    assert np.abs(found - expected).max() <= 0.01 * np.abs(found).max()


def test_threads_share_it(exported: Exported) -> None:
    vision = exported.in_torch()
    shown = [vision.tile(picture) for picture in pictures()] * 3
    expected = [vision.encode(tiles).features for tiles in shown]
    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(vision.encode, shown), expected, strict=True):
            np.testing.assert_array_equal(found.features, alone)


def test_neither_onnx_nor_onnxruntime_is_needed() -> None:
    code = "import sys, vz_edge.backends.torch_vision; print({'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_weights_are_read_as_onnx_reads_them(exported: Exported) -> None:
    found = read_weights(exported.folder / "vision.onnx")
    graph = onnx.load(exported.folder / "vision.onnx").graph
    expected = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    floats = {name: array for name, array in expected.items() if array.dtype == np.float32}
    assert found.keys() == floats.keys() and len(found) > 40
    for name, array in floats.items():
        np.testing.assert_array_equal(found[name].numpy(), array)


@pytest.mark.parametrize("file", ["vision.onnx", "vision.onnx.data"])
def test_a_graph_that_was_cut_off_is_corrupt(exported: Exported, tmp_path: Path, file: str) -> None:
    for name in ("vision.onnx", "vision.onnx.data"):
        data = (exported.folder / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2] if name == file else data)
    with pytest.raises(CorruptBundleError, match=r"vision\.onnx cannot be read as an ONNX graph.*export the bundle"):
        TorchVision.open(tmp_path, exported.manifest, "cpu")


def test_a_graph_of_another_model_is_corrupt(exported: Exported, tmp_path: Path) -> None:
    other = export(tmp_path, "llava_next", BUDGET, num_hidden_layers=2)
    with pytest.raises(CorruptBundleError, match=r"not the weights that the manifest describes \(Missing.*layers\.1"):
        TorchVision.open(other.folder, exported.manifest, "cpu")


def test_a_manifest_of_an_impossible_tower_is_corrupt(exported: Exported) -> None:
    tower = dataclasses.replace(exported.manifest.model.tower, heads=5)
    model = dataclasses.replace(exported.manifest.model, tower=tower)
    with pytest.raises(CorruptBundleError, match=r"the manifest describes \(.*64.* heads \(5\).*export the bundle"):
        TorchVision.open(exported.folder, dataclasses.replace(exported.manifest, model=model), "cpu")


@pytest.mark.parametrize(
    ("release", "available", "expected"), [(True, 10**15, 2), (False, 0, 0), (None, 0, 2), (None, 10**15, 0)]
)
def test_its_weights_are_given_back_where_memory_is_short_or_it_is_asked_for(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, release: bool | None, available: int, expected: int
) -> None:
    released: list[None] = []
    monkeypatch.setattr(MappedWeights, "release", lambda self: released.append(None))
    monkeypatch.setattr(memory_check, "available_memory_bytes", lambda provider: available)
    vision = TorchVision.open(exported.folder, exported.manifest, "cpu", release)
    for _ in range(2):
        vision.encode(vision.tile(np.zeros((90, 120, 3), np.uint8)))
    assert len(released) == expected
