"""A traced torch function inside a graph: free sizes, no clash with what is there, and what equal values do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from vz_edge.host.graph import GraphBuilder
from vz_edge.host.trace import TracedInput, inline


def best_two(values: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the two largest of each row plus an offset, and the rows with these added up."""
    positions = values.topk(2).indices
    return positions + offset, torch.cat([values, values.gather(1, positions).sum(dim=1, keepdim=True)], dim=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    """The function twice in a row, the second time on the first one's result."""
    builder = GraphBuilder("twice", ir.DataType.FLOAT)
    values = builder.input("values", ir.DataType.FLOAT, ["rows", 4])
    offset = builder.input("offset", ir.DataType.INT64, [1])
    example = torch.randn(3, 4)
    rows = {0: "rows"}
    positions, longer = inline(
        builder, best_two, [TracedInput(values, example, rows), TracedInput(offset, torch.tensor([1]), {})], "pick"
    )
    again, _ = inline(
        builder,
        best_two,
        [TracedInput(longer, torch.randn(3, 5), rows), TracedInput(offset, torch.tensor([1]), {})],
        "pick",
    )
    builder.output(positions, "positions", ir.DataType.INT64, ["rows", 2])
    builder.output(again, "again", ir.DataType.INT64, ["rows", 2])
    path: Path = tmp_path_factory.mktemp("trace") / "graph.onnx"
    builder.save(path, lambda *_: None)
    return onnxruntime.InferenceSession(path)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_any_number_of_rows(run: onnxruntime.InferenceSession, rows: int) -> None:
    values = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
    offset = torch.tensor([10])
    expected, longer = best_two(torch.from_numpy(values), offset)
    expected_again, _ = best_two(longer, offset)
    positions, again = run.run(None, {"values": values, "offset": offset.numpy()})
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(again, expected_again)


def test_of_equal_values_the_first_wins(run: onnxruntime.InferenceSession) -> None:
    values = np.array([[1, 2, 2, 2], [3, 3, 3, 3]], dtype=np.float32)
    positions, _ = run.run(None, {"values": values, "offset": np.array([0])})
    assert positions.tolist() == [[1, 2], [0, 1]]


def test_the_exporter_says_nothing(
    run: onnxruntime.InferenceSession, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    builder = GraphBuilder("quiet", ir.DataType.FLOAT)
    values = builder.input("values", ir.DataType.FLOAT, [4])
    inline(builder, lambda x: (x + 1,), [TracedInput(values, torch.zeros(4), {})], "add")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert not recwarn.list
