"""A KV cache for transformers that is allocated once: nothing is copied from token to token, and going back is free.

transformers' own growing cache concatenates, which copies all that was read at every token.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, [1, kv_heads, capacity, head_dim] each; the first ``length`` tokens are valid."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate; pages of memory that no token reaches stay untouched."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_empty((*states.shape[:2], self.capacity, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return all keys and values so far as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        total = self.length + key_states.shape[2]
        self.keys[:, :, self.length : total] = key_states
        self.values[:, :, self.length : total] = value_states
        self.length = total
        return self.keys[:, :, :total], self.values[:, :, :total]

    def get_seq_length(self) -> int:
        """Tokens that are valid."""
        return self.length


class PreallocatedCache(Cache):
    """A PreallocatedLayer for each of ``layers`` decoder layers."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[PreallocatedLayer(capacity) for _ in range(layers)])

    def set_length(self, length: int) -> None:
        """Make the first ``length`` tokens the valid ones; they must have been written."""
        for layer in self.layers:
            layer.length = length

    def copy_from(self, other: PreallocatedCache, length: int) -> None:
        """Take over the first ``length`` tokens of another cache, which may have another capacity."""
        for layer, source in zip(self.layers, other.layers, strict=True):
            if source.is_initialized:
                layer.lazy_initialization(source.keys[:, :, :0], source.values[:, :, :0])
                layer.keys[:, :, :length] = source.keys[:, :, :length]
                layer.values[:, :, :length] = source.values[:, :, :length]
