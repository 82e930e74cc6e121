"""The token table: the same rows for the device's memory map and for the graph, and pictures in their places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from tests.tiny import IMAGE_TOKEN_ID, make_checkpoint
from vz_edge.errors import TensorShapeError
from vz_edge.host import embedding_graph
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.recipe import DecoderSpec, ModelSpec

HIDDEN = 128


def model_spec(vocab_size: int = 512) -> ModelSpec:
    return ModelSpec("llava", DecoderSpec("llama", HIDDEN, 256, 2, 4, 4, 32, vocab_size, 1024), IMAGE_TOKEN_ID)


@pytest.mark.parametrize("precision", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_words_get_their_rows_and_image_features_their_places(tmp_path: Path, precision: ir.DataType) -> None:
    model = make_checkpoint(tmp_path / "model")
    written: list[int] = []
    embedding_graph.write_embedding(
        Checkpoint.open(tmp_path / "model"), model_spec(), precision, tmp_path, lambda _, size: written.append(size)
    )
    dtype = precision.numpy()
    table = model.get_input_embeddings().weight.detach().half().numpy()
    assert sum(written) == (tmp_path / "embedding.data").stat().st_size == table.nbytes
    assert np.array_equal(np.fromfile(tmp_path / "embedding.data", np.float16).reshape(table.shape), table)
    ids = np.array([[1, 9, IMAGE_TOKEN_ID, -1, 4, -7, 2]])
    features = np.random.default_rng(0).standard_normal((3, HIDDEN)).astype(dtype)
    session = ort.InferenceSession(tmp_path / "embedding.onnx")
    (embeds,) = session.run(None, {"input_ids": ids, "image_features": features})
    assert embeds.dtype == dtype
    assert np.array_equal(embeds[0, [2, 3, 5]], features)
    assert np.array_equal(embeds[0, [0, 1, 4, 6]], table[[1, 9, 4, 2]].astype(dtype))
    (words,) = session.run(None, {"input_ids": ids[:, :2], "image_features": features[:0]})
    assert np.array_equal(words[0], table[[1, 9]].astype(dtype))


def test_table_without_the_image_token_is_padded_up_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_graph, "CHUNK_BYTES", 100 * 2 * HIDDEN)  # several pieces
    make_checkpoint(tmp_path / "model", layout="original")
    checkpoint = Checkpoint.open(tmp_path / "model")
    embedding_graph.write_embedding(checkpoint, model_spec(511), ir.DataType.FLOAT, tmp_path, lambda *_: None)
    table = np.fromfile(tmp_path / "embedding.data", np.float16).reshape(IMAGE_TOKEN_ID + 1, HIDDEN)
    expected = checkpoint.load("language_model.embed_tokens.weight").to(torch.float16).numpy()
    assert np.array_equal(table[:511], expected)
    assert not table[511:].any()


def test_table_of_another_width_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, text={"hidden_size": 64})
    with pytest.raises(TensorShapeError, match=r"embed_tokens.weight has shape \[512, 64\], expected \[512, 128\]"):
        embedding_graph.write_embedding(
            Checkpoint.open(tmp_path), model_spec(), ir.DataType.FLOAT, tmp_path, lambda *_: None
        )
