"""Stock ONNX Runtime GenAI loads the folder and generates the tokens that transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.tiny import IMAGE_TOKEN_ID, make_checkpoint
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.decoder_graph import DecoderQuant, build_decoder
from vz_edge.host.embedding_graph import write_embedding
from vz_edge.host.families import spec_from_config
from vz_edge.host.genai_config import genai_config
from vz_edge.host.graph import GraphBuilder

og = pytest.importorskip("onnxruntime_genai")

PIXELS = (1, 3, 16, 8)  # as many numbers as three image tokens have
TOKENS, HIDDEN = 3, 128


@pytest.mark.parametrize(("family", "decoder"), [("llava", "llama"), ("llava_next", "mistral")])
def test_genai_generates_transformers_tokens(
    tmp_path: Path, family: Literal["llava", "llava_next"], decoder: Literal["llama", "mistral"]
) -> None:
    model: Any = make_checkpoint(tmp_path, family, decoder)
    with torch.no_grad():
        embedding = model.get_input_embeddings()
        embedding.weight.copy_(embedding.weight.half())  # as the bundle stores it
    checkpoint = Checkpoint.open(tmp_path)
    spec = spec_from_config(checkpoint.config)
    write_embedding(checkpoint, spec, ir.DataType.FLOAT, tmp_path, lambda *_: None)
    decoder_graph = build_decoder(checkpoint, spec.decoder, ir.DataType.FLOAT, DecoderQuant(None, None))
    decoder_graph.save(tmp_path / "decoder.onnx", lambda *_: None)
    write_vision(tmp_path / "vision.onnx", with_grid=bool(spec.grid_pinpoints))
    config = genai_config(spec, stop_token_ids=(2,), target="cpu")
    (tmp_path / "genai_config.json").write_text(json.dumps(config))

    pixels = np.random.default_rng(0).standard_normal(PIXELS).astype(np.float32)
    ids = np.array([[1, 7, 9, *[IMAGE_TOKEN_ID] * TOKENS, 20, 21]], dtype=np.int32)
    inputs = og.NamedTensors()
    inputs["pixel_values"] = og.Tensor(pixels)
    inputs["num_image_tokens"] = og.Tensor(np.array([TOKENS], dtype=np.int64))
    inputs["input_ids"] = og.Tensor(ids)
    if spec.grid_pinpoints:
        inputs["grid_width"] = og.Tensor(np.array([1], dtype=np.int64))
    genai = og.Model(str(tmp_path))
    parameters = og.GeneratorParams(genai)
    parameters.set_search_options(max_length=64)
    generator = og.Generator(genai, parameters)
    generator.set_inputs(inputs)
    first = [next_token(generator) for _ in range(6)]
    generator.get_logits()  # or the last token chosen never gets into the cache of a multimodal model
    generator.append_tokens(np.array([[30, 31]], dtype=np.int32))  # a later turn, on the same cache
    second = [next_token(generator) for _ in range(4)]

    embeds = embedding(torch.from_numpy(ids).long()).detach()
    embeds[0, 3 : 3 + TOKENS] = torch.from_numpy(pixels).reshape(TOKENS, HIDDEN)
    expected, embeds = greedy(model, embeds, 6)
    assert first == expected
    expected, _ = greedy(model, torch.cat([embeds, embedding(torch.tensor([[30, 31]]))], dim=1), 4)
    assert second == expected


def next_token(generator: Any) -> int:
    generator.generate_next_token()
    return int(generator.get_next_tokens()[0])


@torch.no_grad()
def greedy(model: Any, embeds: torch.Tensor, tokens: int) -> tuple[list[int], torch.Tensor]:
    """Tokens that follow ``embeds``, and the embeddings with theirs appended."""
    chosen = []
    for _ in range(tokens):
        logits = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state[:, -1])
        chosen.append(int(logits.argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[chosen[-1]]]))], dim=1)
    return chosen, embeds


def write_vision(path: Path, with_grid: bool) -> None:
    """A vision graph that hands the pixels on as image features."""
    graph = GraphBuilder("vision", ir.DataType.FLOAT)
    pixels = graph.input("pixel_values", ir.DataType.FLOAT, ["tiles", *PIXELS[1:]])
    features = graph.op("Reshape", pixels, graph.ints(TOKENS, HIDDEN))
    if with_grid:
        width = graph.input("grid_width", ir.DataType.INT64, [1])
        features = graph.op("Mul", features, graph.op("Cast", width, to=ir.DataType.FLOAT))
        # As in a bundle of several budgets: GenAI does not know of it, so the first one is taken.
        budget = graph.optional_input("budget", np.array([0]))
        features = graph.op("Add", features, graph.op("Cast", budget, to=ir.DataType.FLOAT))
    graph.output(features, "image_features", ir.DataType.FLOAT, ["tokens", HIDDEN])
    graph.save(path, lambda *_: None)
