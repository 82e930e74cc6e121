"""The vision graph in ONNX Runtime: the published code's numbers, and transformers' for the vanilla model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests.golden_cases import GOLDEN, cases, model_spec
from tests.tiny import TOWER_FOLDER, make_checkpoint
from vz_edge.budget import TokenBudget
from vz_edge.device.image import vanilla_token_order
from vz_edge.errors import MissingTensorError, TensorShapeError
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.families import spec_from_config
from vz_edge.host.graph import GraphBuilder
from vz_edge.host.quant import QuantConfig
from vz_edge.host.vision_graph import build_vision, reduction
from vz_edge.recipe import ModelSpec

BUDGET = TokenBudget(9, 3)
GRIDS = [(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2)]  # (columns, rows)

Run = Callable[..., list[np.ndarray]]


def session(
    folder: Path,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    budget: TokenBudget | None,
    precision: ir.DataType = ir.DataType.FLOAT,
    quant: QuantConfig | None = None,
) -> Run:
    budgets = () if budget is None else (budget,)
    return run_of(build_vision(checkpoint, spec, budgets, precision, quant), folder)


def run_of(graph: GraphBuilder, folder: Path) -> Run:
    graph.save(folder / "vision.onnx", lambda *_: None)
    runtime = onnxruntime.InferenceSession(folder / "vision.onnx", providers=["CPUExecutionProvider"])
    return lambda **feeds: runtime.run(None, feeds)


def feeds_of(pixel_values: np.ndarray, columns: int | None) -> dict[str, np.ndarray]:
    return {"pixel_values": pixel_values} | ({} if columns is None else {"grid_width": np.array([columns])})


def pixels(tiles: int, side: int = 84, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tiles, 3, side, side)).astype(np.float32)


class Tiny:
    """A tiny checkpoint on disk, and transformers' model of it."""

    def __init__(self, folder: Path, family: str, **options: Any) -> None:
        self.model = make_checkpoint(folder / "model", family, **options)  # type: ignore[arg-type]
        tower = folder / TOWER_FOLDER if options.get("layout") == "original" else None
        self.checkpoint = Checkpoint.open(folder / "model", tower)
        self.spec = spec_from_config(self.checkpoint.config, self.checkpoint.tower_config)

    @torch.inference_mode()
    def expected(
        self, pixel_values: np.ndarray, columns: int | None, budget: TokenBudget
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features and kept positions in torch: transformers' tower and projector, our selection between them."""
        tower = self.model.model.vision_tower
        found = {}
        layer = tower.encoder.layers[self.spec.feature_layer].self_attn
        for name in ("q_proj", "k_proj"):
            getattr(layer, name).register_forward_hook(lambda _m, _i, output, name=name: found.update({name: output}))
        hidden = tower(torch.from_numpy(pixel_values), output_hidden_states=True).hidden_states[self.spec.feature_layer]
        width = None if columns is None else torch.tensor([columns])
        tokens, kept, *_ = reduction(self.spec, budget)(hidden, found["q_proj"][:, 0], found["k_proj"], width)
        return self.model.model.multi_modal_projector(tokens).numpy(), kept.numpy()


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def tiny_graph(tiny: Tiny) -> GraphBuilder:
    """Built while no weight can be read: weights are read when the file is written, one at a time."""

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read while the graph was built")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "load", refuse)
        return build_vision(tiny.checkpoint, tiny.spec, (BUDGET,), ir.DataType.FLOAT, None)


@pytest.fixture(scope="module")
def tiny_run(tiny_graph: GraphBuilder, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_of(tiny_graph, tmp_path_factory.mktemp("graph"))


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


# Tracing a budget takes seconds, and test_select has every case in torch.
@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("llava-1.5", TokenBudget(54, 10)),
        ("llava-next", TokenBudget(54, 10)),
        ("llava-next", TokenBudget(108, 20)),
    ],
    ids=str,
)
def test_golden_positions_and_features(tmp_path: Path, name: str, budget: TokenBudget) -> None:
    run = session(tmp_path, Checkpoint.open(GOLDEN / name), model_spec(name), budget)
    chosen = [case for case in cases(name) if case.budget == budget]
    assert chosen
    for case in chosen:
        pixel_values, grid = case.tiles()
        features, kept, scores, merged = run(**feeds_of(pixel_values, grid and grid[0]))
        np.testing.assert_array_equal(kept, case.kept)
        case.assert_features(features)
        assert_why(kept, scores, merged, budget)


@pytest.mark.parametrize("grid", GRIDS)
def test_any_grid_equals_torch(tiny: Tiny, tiny_run: Run, grid: tuple[int, int]) -> None:
    columns = grid[0] if tiny.spec.family == "llava_next" else None
    pixel_values = pixels(1 + grid[0] * grid[1])
    features, kept, *_ = tiny_run(**feeds_of(pixel_values, columns))
    expected_features, expected_kept = tiny.expected(pixel_values, columns, BUDGET)
    np.testing.assert_array_equal(kept, expected_kept)
    assert features.shape == (BUDGET.total(len(pixel_values)), tiny.spec.decoder.hidden_size)
    assert_close(features, expected_features)


def test_one_tile_gets_the_newline_only_where_there_is_a_grid(tiny: Tiny, tiny_run: Run) -> None:
    pixel_values, has_grid = pixels(1), tiny.spec.family == "llava_next"
    features, kept, *_ = tiny_run(**feeds_of(pixel_values, 1 if has_grid else None))
    assert kept.shape == (1, BUDGET.dominant)
    assert len(features) == BUDGET.per_tile + has_grid
    if has_grid:
        newline = tiny.model.model.image_newline.detach().numpy()
        np.testing.assert_array_equal(features[-1], newline)
        # It is alone in its tile as in the first one of a grid.
        in_grid, *_ = tiny_run(**feeds_of(np.concatenate([pixel_values, pixels(2, seed=1)]), 2))
        assert_close(features[:-1], in_grid[: BUDGET.per_tile])


def test_the_last_layer_is_not_in_the_graph(tiny: Tiny, tiny_graph: GraphBuilder) -> None:
    layers = tiny.spec.tower.layers
    assert sum(node.op_type == "MultiHeadAttention" for node in tiny_graph.graph) == layers - 1
    assert not any(f"layers.{layers - 1}." in name for name in tiny_graph.graph.initializers)


@pytest.mark.parametrize("feature_layer", [-1, -3, 1, 3])
def test_other_feature_layers(tmp_path: Path, feature_layer: int) -> None:
    tiny = Tiny(tmp_path, "llava", vision={"hidden_act": "gelu"})
    config = tiny.checkpoint.config | {"vision_feature_layer": feature_layer}
    run = session(tmp_path, tiny.checkpoint, spec_from_config(config), None)
    pixel_values = pixels(2)
    with torch.inference_mode():
        expected = tiny.model.model.get_image_features(
            torch.from_numpy(pixel_values), vision_feature_layer=feature_layer
        ).pooler_output
    assert_close(run(pixel_values=pixel_values)[0], torch.cat(list(expected)).numpy())


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_several_feature_layers(tmp_path: Path, family: str) -> None:
    """With a budget the deepest of them, whichever comes last in the list, says what is kept."""
    tiny = Tiny(tmp_path, family, whole={"vision_feature_layer": [-2, 0, 1], "multimodal_projector_bias": False})
    assert tiny.spec.feature_layers == (-2, 0, 1) and tiny.spec.feature_layer == -2
    columns = 2 if family == "llava_next" else None
    pixel_values, tower = pixels(3), tiny.model.model.vision_tower
    found: dict[str, torch.Tensor] = {}
    for name in ("q_proj", "k_proj"):
        layer = getattr(tower.encoder.layers[1].self_attn, name)
        layer.register_forward_hook(lambda _m, _i, output, name=name: found.update({name: output}))
    with torch.inference_mode():
        states = tower(torch.from_numpy(pixel_values), output_hidden_states=True).hidden_states
        hidden = torch.cat([states[index] for index in (-2, 0, 1)], dim=-1)
        width = None if columns is None else torch.tensor([columns])
        tokens, kept, *_ = reduction(tiny.spec, BUDGET)(hidden, found["q_proj"][:, 0], found["k_proj"], width)
        expected = tiny.model.model.multi_modal_projector(tokens)
    run = session(tmp_path, tiny.checkpoint, tiny.spec, BUDGET)
    features, found_kept, *_ = run(**feeds_of(pixel_values, columns))
    np.testing.assert_array_equal(found_kept, kept)
    assert_close(features, expected.numpy())


@pytest.mark.parametrize("layout", ["new", "old", "original"])
@torch.inference_mode()
def test_all_tokens_of_llava_are_transformers_own(tmp_path: Path, layout: str) -> None:
    tiny = Tiny(tmp_path, "llava", layout=layout)
    pixel_values = pixels(2)
    expected = tiny.model.model.get_image_features(torch.from_numpy(pixel_values)).pooler_output
    (features,) = session(tmp_path, tiny.checkpoint, tiny.spec, None)(pixel_values=pixel_values)
    assert_close(features, torch.cat(list(expected)).numpy())


@pytest.mark.parametrize("layout", ["new", "old", "original"])
@torch.inference_mode()
def test_all_tokens_of_llava_next_are_transformers_own(tmp_path: Path, layout: str) -> None:
    """Unpadding and newlines included, for pictures that fill their grid and pictures that do not."""
    tiny = Tiny(tmp_path, "llava_next", layout=layout)
    run = session(tmp_path, tiny.checkpoint, tiny.spec, None)
    for columns, rows, size in [(2, 2, (150, 160)), (2, 1, (168, 84)), (1, 3, (60, 250)), (3, 1, (400, 130))]:
        pixel_values = pixels(1 + columns * rows)
        order = vanilla_token_order(size, (columns, rows), tiny.spec.tower.patches_per_side)
        expected = tiny.model.model.get_image_features(
            torch.from_numpy(pixel_values)[None], torch.tensor([size[::-1]])
        ).pooler_output[0]
        (features,) = run(pixel_values=pixel_values, token_order=order)
        assert_close(features, expected.numpy())


@pytest.mark.parametrize("precision", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_each_of_several_budgets_gives_what_it_gives_alone(tiny: Tiny, precision: ir.DataType, tmp_path: Path) -> None:
    budgets = (BUDGET, TokenBudget(9, 3), TokenBudget(4, 1))
    graph = build_vision(tiny.checkpoint, tiny.spec, budgets, precision, None)
    run = run_of(graph, tmp_path)
    feeds = feeds_of(pixels(3), 2 if tiny.spec.family == "llava_next" else None)
    for index, budget in enumerate(budgets):
        alone = session(tmp_path, tiny.checkpoint, tiny.spec, budget, precision)(**feeds)
        for found, expected in zip(run(**feeds, budget=np.array([index])), alone, strict=True):
            np.testing.assert_array_equal(found, expected)
    for found, expected in zip(run(**feeds), run(**feeds, budget=np.array([0])), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_further_budgets_add_no_weights(tiny: Tiny, tiny_graph: GraphBuilder) -> None:
    several = build_vision(tiny.checkpoint, tiny.spec, (BUDGET, TokenBudget(4, 1)), ir.DataType.FLOAT, None)
    weights = [
        {name for name in graph.graph.initializers if name.startswith(("vision_tower", "multi_modal", "image_newline"))}
        for graph in (several, tiny_graph)
    ]
    assert weights[0] == weights[1]
    assert several.weight_bytes() - tiny_graph.weight_bytes() < 2_000  # positions, which each selection counts


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, list[dict[str, np.ndarray]], list[list[np.ndarray]]]:
    """A model with a grid, some pictures, and its features and kept positions in float32."""
    folder = tmp_path_factory.mktemp("exact")
    tiny = Tiny(folder, "llava_next", vision={"hidden_size": 128})
    inputs = [feeds_of(pixels(5, seed=seed), 2) for seed in range(4)]
    return tiny, inputs, [list(tiny.expected(feeds["pixel_values"], 2, BUDGET)) for feeds in inputs]


def test_half_precision_keeps_the_same_positions(exact: tuple, tmp_path: Path) -> None:
    tiny, inputs, expected = exact
    run = session(tmp_path, tiny.checkpoint, tiny.spec, BUDGET, ir.DataType.FLOAT16)
    assert share_kept([run(**feeds)[1] for feeds in inputs], [kept for _, kept in expected]) > 0.98
    for feeds, (expected_features, expected_kept) in zip(inputs, expected, strict=True):
        features, kept, *_ = run(**feeds)
        assert features.dtype == np.float16
        if np.array_equal(kept, expected_kept):
            assert_close(features, expected_features, tolerance=0.02)


def test_eight_bit_linear_layers_keep_most_positions(exact: tuple, tmp_path: Path) -> None:
    tiny, inputs, expected = exact
    graph = build_vision(tiny.checkpoint, tiny.spec, (BUDGET,), ir.DataType.FLOAT, QuantConfig(bits=8, block_size=32))
    linears = (tiny.spec.tower.layers - 1) * 6 + 2
    assert sum(node.op_type == "MatMulNBits" for node in graph.graph) == linears
    run = run_of(graph, tmp_path)
    found = [run(**feeds)[:2] for feeds in inputs]
    assert share_kept([kept for _, kept in found], [kept for _, kept in expected]) > 0.95
    assert all(
        features.shape == exact_features.shape
        for (features, _), (exact_features, _) in zip(found, expected, strict=True)
    )


def assert_why(kept: np.ndarray, scores: np.ndarray, merged: np.ndarray, budget: TokenBudget) -> None:
    """What is said about a choice is what it follows from: CLS's attention, and every other token merged once."""
    tiles, patches = scores.shape
    best = np.sort(1 + np.argsort(-scores, axis=1)[:, : budget.dominant - 1], axis=1)
    np.testing.assert_array_equal(kept, np.hstack([np.zeros((tiles, 1), np.int64), best]))
    assert merged.shape == (tiles, 1 + patches)
    for tile in range(tiles):
        np.testing.assert_array_equal(np.flatnonzero(merged[tile] == -1), kept[tile])
        assert set(merged[tile]) == set(range(-1, budget.contextual))


def share_kept(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The share of the expected positions that are kept, over all tiles."""
    pairs = zip(np.concatenate(found), np.concatenate(expected), strict=True)
    return float(np.mean([np.isin(b, a).mean() for a, b in pairs]))


def test_another_shape_than_the_config_says(tiny: Tiny) -> None:
    config = tiny.checkpoint.config
    wrong = config | {"vision_config": config["vision_config"] | {"intermediate_size": 100}}
    with pytest.raises(TensorShapeError, match=r"mlp\.fc1\.weight has shape"):
        build_vision(tiny.checkpoint, spec_from_config(wrong), (BUDGET,), ir.DataType.FLOAT, None)


def test_a_tower_with_fewer_layers_than_the_config_says(tiny: Tiny) -> None:
    config = tiny.checkpoint.config
    wrong = config | {"vision_config": config["vision_config"] | {"num_hidden_layers": 9}}
    with pytest.raises(MissingTensorError, match=r"vision_tower\.encoder\.layers\.3\."):
        build_vision(tiny.checkpoint, spec_from_config(wrong), (BUDGET,), ir.DataType.FLOAT, None)
