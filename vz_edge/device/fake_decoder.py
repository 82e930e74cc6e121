"""A decoder without a model, for testing what is built on ``EdgeModel`` where there is no bundle or no time for one.

>>> model = EdgeModel(manifest, vision, chat, embedding, FakeDecoder(hidden_size=4096, vocab_size=32064), ...)

Its answers mean nothing, but they keep the decoder's contract: they depend on every embedding that was read and on
their order, and on nothing else.
"""

from __future__ import annotations

import numpy as np

from vz_edge.device.decoder import check_append, check_fork, check_rewind


class FakeDecoder:
    """Logits are a fixed random projection [hidden, vocab] of the sine of a sum of all embeddings, weighed by place.

    The sine keeps a few large embeddings from deciding alone.
    """

    dtype = np.dtype(np.float32)
    contexts_at_once: int | None = None

    def __init__(self, hidden_size: int, vocab_size: int, seed: int = 0) -> None:
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        rng = np.random.default_rng(seed)
        self.projection = rng.standard_normal((hidden_size, vocab_size), dtype=np.float32)

    @property
    def cache_bytes_per_token(self) -> int:
        """The embedding itself is what it keeps of a token."""
        return self.hidden_size * self.dtype.itemsize

    def start(self, capacity: int) -> FakeContext:
        """An empty context for up to ``capacity`` tokens."""
        return FakeContext(self, capacity)


class FakeContext:
    """The embeddings that were read."""

    def __init__(self, decoder: FakeDecoder, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._decoder = decoder
        self._embeds = np.zeros((capacity, decoder.hidden_size), decoder.dtype)

    def append(self, embeds: np.ndarray) -> np.ndarray:
        """As Context.append."""
        check_append(self, len(embeds))
        total = self.length + len(embeds)
        self._embeds[self.length : total] = embeds
        self.length = total
        weights = np.cos(np.arange(total, dtype=np.float32))
        logits: np.ndarray = np.sin(weights @ self._embeds[:total]) @ self._decoder.projection
        return logits

    def rewind(self, length: int) -> None:
        """As Context.rewind."""
        check_rewind(self, length)
        self.length = length

    @property
    def cache_bytes(self) -> int:
        """As Context.cache_bytes."""
        return self._embeds.nbytes

    def fork(self, length: int | None = None, capacity: int | None = None) -> FakeContext:
        """As Context.fork."""
        length, capacity = check_fork(self, length, capacity)
        twin = FakeContext(self._decoder, capacity)
        twin.length = length
        twin._embeds[:length] = self._embeds[:length]
        return twin
