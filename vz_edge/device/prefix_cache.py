"""KV caches of the last prompts, kept so that a prompt goes on from the longest start that one of them holds.

>>> prefix = cache.take(items, capacity)  # has read items[: len(prefix.items)]
>>> logits = prefix.context.append(embed(items[len(prefix.items) :]))
>>> prefix.hold(items)
>>> cache.put(prefix)

A prompt is a list of items: token ids of text, and whole pictures. Causal attention makes the keys and values of a
token depend on the tokens before it alone, so two prompts that begin with the same items have that part of their KV
caches in common (vLLM's automatic prefix caching, arXiv 2309.06180; SGLang's RadixAttention, arXiv 2312.07104). Here a
cache is one piece of memory that one prompt owns. Where a prompt leaves another one's course, the cache is

* taken over and rewound, where what is forgotten is no longer than what is shared: it is soon read again
* copied, as far as it is shared, where more would be forgotten. So a copy never costs more than it saves
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence

from vz_edge.device.decoder import Context, Decoder
from vz_edge.device.vision import VisionResult

Item = int | VisionResult  # what stands at a place of a prompt: a token of text, or a whole picture
# All prompts of a template begin alike; what they share there is sooner read than copied.
LEAST_SHARED_TOKENS = 16
# Contexts have capacities of whole blocks: a conversation that grows needs a larger copy once in a block.
BLOCK_TOKENS = 256


class Prefix:
    """A context, and what it holds item by item."""

    def __init__(self, context: Context, items: Sequence[Item] = ()) -> None:
        self.context = context
        self.items = list(items)

    @property
    def size_bytes(self) -> int:
        """Memory of the KV cache and of the pictures that are in it."""
        pictures = {id(item): item.size_bytes for item in self.items if isinstance(item, VisionResult)}
        return self.context.cache_bytes + sum(pictures.values())

    def rewind_to_common(self, items: Sequence[Item]) -> int:
        """Forget all that ``items`` do not begin with; returns how many of them are left."""
        common = common_length(self.items, items)
        self.items = self.items[:common]
        self.context.rewind(token_count(self.items))
        return common

    def hold(self, items: Sequence[Item]) -> None:
        """Hold ``items`` where the context has read as much, else what was held before; forget what comes after."""
        if self.context.length >= token_count(items):
            self.items = list(items)
        self.context.rewind(token_count(self.items))

    def fork(self, length: int | None = None, capacity: int | None = None) -> Prefix:
        """A copy of the first ``length`` items, by default all, in a context of ``capacity`` tokens."""
        items = self.items[:length]
        return Prefix(self.context.fork(token_count(items), capacity), items)


class PrefixCache:
    """Prefixes of ``decoder``, no more than ``max_bytes`` of them; the least recently used are let go.

    One that is taken belongs to whoever took it until it is put back. A context has at most ``context_length`` tokens.
    Safe to share between threads.
    """

    def __init__(self, decoder: Decoder, context_length: int, max_bytes: int) -> None:
        self._decoder = decoder
        self._context_length = context_length
        self._max_bytes = max_bytes
        self._kept: dict[Prefix, int] = {}  # and their bytes; the least recently used first
        # A stream that nobody reads on is put back by the garbage collector, maybe in the midst of a call.
        self._lock = threading.RLock()

    @property
    def size_bytes(self) -> int:
        """Memory of the prefixes that are kept."""
        return sum(tuple(self._kept.values()))  # without the lock, which a copy holds for long

    def take(self, items: Sequence[Item], capacity: int) -> Prefix:
        """The longest start of ``items`` that is known, in a context for ``capacity`` tokens or more.

        It never holds all of them: the last has to be read, for its logits. What was kept makes room for it, so that
        all together are no more than ``max_bytes``, or than it alone needs.
        """
        capacity = self._whole_blocks(capacity)
        new_bytes = capacity * self._decoder.cache_bytes_per_token
        with self._lock:
            found, common = self._longest(items[:-1])
            if found is None:
                self._make_room(new_bytes)
                return Prefix(self._decoder.start(capacity))
            found_bytes = self._kept.pop(found, found.size_bytes)
            shared = token_count(items[:common])
            if found.context.length - shared > shared and self._has_room({found: found_bytes}, new_bytes):
                self._make_room(new_bytes + found_bytes)
                self._kept[found] = found_bytes
                return found.fork(common, capacity)
            if found.context.capacity < capacity:
                self._make_room(new_bytes + found_bytes)
                return found.fork(common, capacity)
            self._make_room(max(new_bytes, found_bytes))
            found.rewind_to_common(items[:common])
            return found

    def put(self, prefix: Prefix) -> None:
        """Keep ``prefix``, in the place of others where need be, unless it is too large by itself."""
        size_bytes = prefix.size_bytes
        with self._lock:
            if self._max_bytes and self._has_room({}, size_bytes):  # with 0 not even what takes no memory of its own
                self._make_room(size_bytes)
                self._kept[prefix] = size_bytes

    def clear(self) -> None:
        """Let go of all that is kept."""
        with self._lock:
            self._kept.clear()

    def _longest(self, items: Sequence[Item]) -> tuple[Prefix | None, int]:
        """The prefix that has most tokens in common with ``items``, and how many items these are.

        Of those that have as many, the one that has least to forget.
        """
        found, found_common = None, 0
        best: tuple[float, float] = (LEAST_SHARED_TOKENS, -math.inf)
        for prefix in tuple(self._kept):
            common = common_length(prefix.items, items)
            rank = (token_count(items[:common]), -prefix.context.length)
            if rank > best:
                found, found_common, best = prefix, common, rank
        return found, found_common

    def _whole_blocks(self, capacity: int) -> int:
        if self._decoder.contexts_at_once is not None:  # a larger copy would be one too many
            return self._context_length
        return min(self._context_length, -(-capacity // BLOCK_TOKENS) * BLOCK_TOKENS)

    def _has_room(self, kept: Mapping[Prefix, int], more_bytes: int) -> bool:
        """Whether another prefix, of ``more_bytes``, has room beside ``kept``."""
        most = self._decoder.contexts_at_once
        return sum(kept.values()) + more_bytes <= self._max_bytes and (most is None or len(kept) < most)

    def _make_room(self, more_bytes: int) -> None:
        """Let go of the least recently used until ``more_bytes`` have room, or nothing is left."""
        while not self._has_room(self._kept, more_bytes) and (oldest := next(iter(self._kept), None)):
            self._kept.pop(oldest, None)


def common_length(one: Sequence[Item], other: Sequence[Item]) -> int:
    """How many items both begin with. A picture equals only itself: what is in it is not compared."""
    for length, (left, right) in enumerate(zip(one, other, strict=False)):
        if not (left is right or (isinstance(left, int) and left == right)):
            return length
    return min(len(one), len(other))


def token_count(items: Sequence[Item]) -> int:
    """Tokens that ``items`` are for the decoder."""
    return sum(len(item.features) if isinstance(item, VisionResult) else 1 for item in items)
