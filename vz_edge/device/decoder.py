"""What a language model must be able to do here, whichever runtime it is in: embeddings in, logits out, and back.

A ``Decoder`` is loaded once and shared; each conversation has a ``Context`` of its own, a KV cache and its length:

>>> context = decoder.start(capacity=1024)
>>> logits = context.append(prompt_embeds)       # prefill
>>> logits = context.append(next_token_embed)    # one step of decoding
>>> context.rewind(len(picture_embeds))          # ask something else about the same picture

Implementations: ``vz_edge.device.onnx_decoder`` (a bundle's decoder.onnx), ``vz_edge.backends.transformers_decoder``
(bitsandbytes weights; needs torch) and ``vz_edge.device.fake_decoder``. One contract test runs against all of them.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vz_edge.errors import ContextLengthError


class Context(Protocol):
    """What a decoder has read so far. For one thread at a time; contexts of one decoder do not touch each other."""

    @property
    def capacity(self) -> int:
        """The most tokens that it holds."""

    @property
    def length(self) -> int:
        """Tokens that it holds."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of memory that its KV cache takes now, and gives back with it; no less than they are."""

    def append(self, embeds: np.ndarray) -> np.ndarray:
        """Read embeddings [n, hidden] and return the logits [vocab], float32, of the token after them.

        The array is the caller's to keep. However the tokens come in, the logits are those of reading them all at
        once. Raises ContextLengthError, before anything is run, where they do not fit.
        """

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens. Raises ContextLengthError for more than were read."""

    def fork(self, length: int | None = None, capacity: int | None = None) -> Context:
        """An independent context that has read the first ``length`` tokens, by default all. Their cache is copied.

        It has room for ``capacity`` tokens, by default as many as this one. Raises ContextLengthError for a length that
        was not read, or is more than the capacity.
        """


class Decoder(Protocol):
    """A language model without its token table: stateless, safe to share between threads."""

    @property
    def dtype(self) -> np.dtype:
        """What embeddings are given in without loss."""

    @property
    def hidden_size(self) -> int:
        """Width of an embedding."""

    @property
    def vocab_size(self) -> int:
        """Number of logits."""

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of KV cache that a token takes, all layers together."""

    @property
    def contexts_at_once(self) -> int | None:
        """How many contexts can be there and decode as fast as one alone; None: any number."""

    def start(self, capacity: int) -> Context:
        """An empty context for up to ``capacity`` tokens."""


def check_append(context: Context, count: int) -> None:
    """Raise ContextLengthError unless ``count`` more tokens fit into ``context``."""
    left = context.capacity - context.length
    if not 0 < count <= left:
        raise ContextLengthError(
            f"{count} tokens were given to a context that holds {context.length} of {context.capacity}; 1 to {left} fit"
        )


def check_rewind(context: Context, length: int) -> None:
    """Raise ContextLengthError unless ``context`` holds ``length`` tokens."""
    if not 0 <= length <= context.length:
        raise ContextLengthError(f"cannot rewind to {length} tokens; the context holds {context.length}")


def check_fork(context: Context, length: int | None, capacity: int | None) -> tuple[int, int]:
    """Length and capacity of a fork, None replaced. Raises ContextLengthError where it cannot be."""
    length = context.length if length is None else length
    capacity = context.capacity if capacity is None else capacity
    if not 0 <= length <= min(context.length, capacity):
        raise ContextLengthError(
            f"cannot fork {length} tokens into a capacity of {capacity}; the context holds {context.length}"
        )
    return length, capacity
