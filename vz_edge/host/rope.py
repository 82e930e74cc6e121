"""Rotary position embeddings (Su et al., 2021) as the tables that GroupQueryAttention reads.

The angles come from transformers' own implementation, so that each variant means here what it means there.
"""

from __future__ import annotations

import numpy as np
import torch

from vz_edge.errors import UnsupportedModelError
from vz_edge.recipe import DecoderSpec

SUPPORTED = ("default", "linear", "llama3")  # those whose angles do not depend on the length of the prompt


def rotary_tables(spec: DecoderSpec) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [context_length, head_dim / 2], float32. Raises UnsupportedModelError."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "default", **(spec.rope_scaling or {}), "rope_theta": spec.rope_theta}
    if parameters["rope_type"] not in SUPPORTED:
        raise UnsupportedModelError(
            f"rotary variant {parameters['rope_type']!r} has no graph here; supported are {', '.join(SUPPORTED)}"
        )
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.context_length,
        rope_parameters=parameters,
    )
    positions = torch.arange(spec.context_length).unsqueeze(0)
    cosines, sines = LlamaRotaryEmbedding(config)(torch.empty(0, dtype=torch.float32), positions)
    half = spec.head_dim // 2  # the second half repeats the first
    return cosines[0, :, :half].numpy(), sines[0, :, :half].numpy()
