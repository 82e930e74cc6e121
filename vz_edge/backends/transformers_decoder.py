"""The decoder in torch: a causal language model of transformers, with weights of any kind that it loads.

Linear layers of bitsandbytes rearrange their weights at their first call, so one call runs at a time; a GPU, and the
threads of a processor, are shared by the calls anyway.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from vz_edge.backends.kv_cache import PreallocatedCache
from vz_edge.device.decoder import check_append, check_fork, check_rewind


class TransformersDecoder:
    """``model`` (LlamaForCausalLM or its like, in eval mode) as a Decoder.

    ``dtype`` is float16 for a model in fp16, else float32: numpy has no bf16.
    """

    contexts_at_once: int | None = None

    def __init__(self, model: Any) -> None:
        self.model = model
        self.lock = threading.Lock()
        self.dtype = np.dtype(np.float16 if model.dtype == torch.float16 else np.float32)
        self.hidden_size = int(model.config.hidden_size)
        self.vocab_size = int(model.config.vocab_size)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of KV cache that a token takes, all layers together."""
        config = self.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * self.model.dtype.itemsize)

    def start(self, capacity: int) -> TransformersContext:
        """An empty context for up to ``capacity`` tokens."""
        return TransformersContext(self, capacity)


class TransformersContext:
    """A KV cache and its length. It is allocated at the first append."""

    def __init__(self, decoder: TransformersDecoder, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._decoder = decoder
        self._cache = PreallocatedCache(decoder.model.config.num_hidden_layers, capacity)

    @torch.inference_mode()
    def append(self, embeds: np.ndarray) -> np.ndarray:
        """As Context.append."""
        check_append(self, len(embeds))
        model = self._decoder.model
        self._cache.set_length(self.length)  # also after a call that broke off between two layers
        with self._decoder.lock:
            output = model(
                inputs_embeds=torch.from_numpy(np.ascontiguousarray(embeds))[None].to(model.device, model.dtype),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.length += len(embeds)
        logits: np.ndarray = output.logits[0, -1].float().cpu().numpy()
        return logits

    def rewind(self, length: int) -> None:
        """As Context.rewind."""
        check_rewind(self, length)
        self.length = length

    @property
    def cache_bytes(self) -> int:
        """As Context.cache_bytes; on the CPU pages that no token has reached are counted too, and take nothing."""
        return self.capacity * self._decoder.cache_bytes_per_token

    @torch.inference_mode()
    def fork(self, length: int | None = None, capacity: int | None = None) -> TransformersContext:
        """As Context.fork."""
        length, capacity = check_fork(self, length, capacity)
        twin = TransformersContext(self._decoder, capacity)
        twin._cache.copy_from(self._cache, length)
        twin.length = length
        return twin
