"""Rotary position embeddings (Su et al., 2021) as the tables that GroupQueryAttention reads.

The angles come from transformers' own implementation, so that each variant means here what it means there. A table has
one row per position whatever the length of the prompt, so a variant is supported where the angles of a position do not
depend on that length: linear (Chen et al., 2023), yarn (Peng et al., 2023, arXiv 2309.00071) and llama3 do not, dynamic
NTK and longrope do. Yarn's factor on the attention is in its cosines and sines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vz_edge.errors import CheckpointError, UnsupportedModelError
from vz_edge.recipe import DecoderSpec

# By variant the numbers that it reads: needed, and with a default. Any other key would be passed by in silence.
SUPPORTED: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}
WITHOUT_EFFECT = {"original_max_position_embeddings", "finetuned"}  # in a variant that does not read them
FLAGS = {"truncate"}


def check_rope(parameters: dict[str, Any]) -> None:
    """Check a config's rotary variant and its numbers. Raises UnsupportedModelError, CheckpointError."""
    variant = parameters.get("rope_type")
    if variant not in SUPPORTED:
        raise UnsupportedModelError(
            f"rotary variant {variant!r} (rope_scaling, rope_parameters) has no graph here; supported are "
            f"{', '.join(SUPPORTED)}"
        )
    needed, optional = SUPPORTED[variant]
    numbers = {name: value for name, value in parameters.items() if name not in ("rope_type", "type")}
    unknown = sorted(set(numbers) - needed - optional - WITHOUT_EFFECT)
    if unknown:
        raise UnsupportedModelError(
            f"rotary variant {variant!r} with {', '.join(unknown)} has no graph here; it reads "
            f"{', '.join(sorted(needed | optional)) or 'nothing'}"
        )
    for name in sorted(needed | optional):
        value: Any = numbers.get(name)
        if value is None and name in optional:
            continue
        is_right = type(value) is bool if name in FLAGS else type(value) in (int, float) and value > 0
        if not is_right:
            expected = "true or false" if name in FLAGS else "a number above 0"
            raise CheckpointError(f"config.json: rotary variant {variant!r}: {name} is {value!r}; expected {expected}")


def rotary_tables(spec: DecoderSpec) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [context_length, head_dim / 2], float32. Raises UnsupportedModelError, CheckpointError."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "default", **(spec.rope_scaling or {})}
    check_rope(parameters)
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.context_length,
        rope_parameters=parameters | {"rope_theta": spec.rope_theta},
    )
    positions = torch.arange(spec.context_length).unsqueeze(0)
    cosines, sines = LlamaRotaryEmbedding(config)(torch.empty(0, dtype=torch.float32), positions)
    half = spec.head_dim // 2  # the second half repeats the first
    return cosines[0, :, :half].numpy(), sines[0, :, :half].numpy()
