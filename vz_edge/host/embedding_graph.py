"""The token table: ``embedding.data`` for the device's memory map, ``embedding.onnx`` for ONNX Runtime GenAI.

embedding.data is the table in fp16, row-major [rows, hidden], and nothing else. The graph reads the same file::

    input_ids [1, n] int64, image_features [tokens, hidden] -> inputs_embeds [1, n, hidden]

Image features take, in order, the places whose id is the image token's or negative: GenAI's phi3v pipeline marks
image positions with negative ids.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.decoder_spec import TOKEN_TABLE
from vz_edge.host.graph import GraphBuilder
from vz_edge.planning.memory import embedding_rows
from vz_edge.recipe import ModelSpec

TABLE = "embedding.data"
GRAPH = "embedding.onnx"
CHUNK_BYTES = 16_000_000


def write_embedding(
    checkpoint: Checkpoint,
    model: ModelSpec,
    precision: ir.DataType,
    folder: Path,
    progress: Callable[[str, int], None],
) -> None:
    """Write both files; ``progress(name, bytes)`` is called for each piece of the table.

    Raises MissingTensorError and TensorShapeError.
    """
    write_table(checkpoint, model, folder, progress)
    graph = _graph(embedding_rows(model), model.decoder.hidden_size, model.image_token_id, precision)
    ir.save(graph.model(), folder / GRAPH)


def write_table(checkpoint: Checkpoint, model: ModelSpec, folder: Path, progress: Callable[[str, int], None]) -> None:
    """Write embedding.data alone, as ``write_embedding`` does."""
    vocab_size, hidden_size = model.decoder.vocab_size, model.decoder.hidden_size
    weight = checkpoint.weight(TOKEN_TABLE, (vocab_size, hidden_size))
    step = max(1, CHUNK_BYTES // (2 * hidden_size))
    with (folder / TABLE).open("wb") as file:
        for start in range(0, vocab_size, step):
            table_rows = weight.load(slice(start, start + step)).to(torch.float16)
            progress(TOKEN_TABLE, file.write(table_rows.numpy().data))
        padding = np.zeros(
            (embedding_rows(model) - vocab_size, hidden_size), np.float16
        )  # so that the image token has a row
        progress(TOKEN_TABLE, file.write(padding.data))


def _graph(rows: int, hidden_size: int, image_token_id: int, precision: ir.DataType) -> GraphBuilder:
    graph = GraphBuilder("embedding", precision)
    op = graph.op
    ids = graph.input("input_ids", ir.DataType.INT64, [1, "sequence"])
    features = graph.input("image_features", precision, ["tokens", hidden_size])
    table = graph.stored_in(TABLE, "table", ir.DataType.FLOAT16, (rows, hidden_size))
    zero = graph.constant(np.array(0, np.int64), "zero")
    image_token = graph.constant(np.array(image_token_id, np.int64), "image_token")
    is_image = op("Or", op("Less", ids, zero), op("Equal", ids, image_token))
    words = op("Cast", op("Gather", table, op("Where", is_image, zero, ids)), to=precision)
    places = op("Transpose", op("NonZero", is_image), perm=[1, 0])  # [tokens, 2]: (0, position)
    embeds = op("ScatterND", words, places, features)
    graph.output(embeds, "inputs_embeds", precision, [1, "sequence", hidden_size])
    return graph
