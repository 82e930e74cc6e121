"""Bundles loaded as the stages want them: on the card or on the processor, with a CUDA graph or without."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.stage import Settings
from vz_edge.device.cuda_graph import GraphDecoder
from vz_edge.device.model import EdgeModel
from vz_edge.device.onnx_decoder import OnnxDecoder


def load(folder: Path, settings: Settings, graph_tokens: int = 0) -> EdgeModel:
    """The bundle; with ``graph_tokens`` it decodes contexts of up to so many tokens by a CUDA graph.

    On a processor the graph's steps then run without being captured.
    """
    if settings.device == "cuda" and graph_tokens:
        return EdgeModel.load(folder, settings.providers, max_context=graph_tokens, cuda_graph=True)
    model = EdgeModel.load(folder, settings.providers, max_context=graph_tokens or None)
    if graph_tokens:
        assert isinstance(model.decoder, OnnxDecoder)
        model.decoder = GraphDecoder(model.decoder.session, graph_tokens)
    return model
