"""What is taken from a prefix cache is as if it had been read anew, and is as much as was known, within the bytes."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vz_edge.device.fake_decoder import FakeContext, FakeDecoder
from vz_edge.device.prefix_cache import BLOCK_TOKENS, LEAST_SHARED_TOKENS, Item, Prefix, PrefixCache, token_count
from vz_edge.device.vision import VisionResult

HIDDEN, VOCAB, CONTEXT = 8, 40, 1000
RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((VOCAB, HIDDEN), dtype=np.float32)
PICTURES = [
    VisionResult(RNG.standard_normal((tokens, HIDDEN), dtype=np.float32), None, None, (1, 1)) for tokens in (30, 50)
]
BLOCK_BYTES = BLOCK_TOKENS * HIDDEN * 4
PLENTY = 100 * BLOCK_BYTES


class CountingDecoder(FakeDecoder):
    """Knows the contexts that are there."""

    def __init__(self) -> None:
        super().__init__(HIDDEN, VOCAB)
        self.contexts = weakref.WeakSet[FakeContext]()

    def start(self, capacity: int) -> FakeContext:
        return CountedContext(self, capacity)


class CountedContext(FakeContext):
    def __init__(self, decoder: CountingDecoder, capacity: int) -> None:
        super().__init__(decoder, capacity)
        decoder.contexts.add(self)

    def fork(self, length: int | None = None, capacity: int | None = None) -> FakeContext:
        twin = CountedContext(self._decoder, capacity or self.capacity)  # type: ignore[arg-type]
        twin.length = self.length if length is None else length
        twin._embeds[: twin.length] = self._embeds[: twin.length]
        return twin


class OneAtATime(CountingDecoder):
    """As one that decodes by a CUDA graph."""

    contexts_at_once = 1


def embed(items: list[Item]) -> np.ndarray:
    return np.concatenate([item.features if isinstance(item, VisionResult) else TABLE[[item]] for item in items])


def words(seed: int, count: int = 40) -> list[Item]:
    """Text like no other."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, count)]


def read(cache: PrefixCache, prompt: list[Item], answer: list[Item] = []) -> int:  # noqa: B006
    """Prefill a prompt and read an answer; how many tokens of the prompt were known."""
    prefix = cache.take(prompt, token_count(prompt) + len(answer))
    known = prefix.context.length
    assert known == token_count(prefix.items) < token_count(prompt)
    assert prefix.items == prompt[: len(prefix.items)]
    whole = [*prompt, *answer]
    found = prefix.context.append(embed(whole[len(prefix.items) :]))
    np.testing.assert_array_equal(found, FakeDecoder(HIDDEN, VOCAB).start(CONTEXT).append(embed(whole)))
    prefix.hold(whole)
    cache.put(prefix)
    return known


def test_a_prompt_that_goes_on_takes_over_what_was_read() -> None:
    decoder = CountingDecoder()
    cache = PrefixCache(decoder, CONTEXT, PLENTY)
    prompt = [*words(1), PICTURES[0], *words(2)]
    assert read(cache, prompt, words(3)) == 0
    longer = [*prompt, *words(3), *words(4)]
    assert read(cache, longer) == token_count([*prompt, *words(3)])
    assert len(decoder.contexts) == 1


def test_the_last_token_is_read_again_for_its_logits() -> None:
    cache = PrefixCache(CountingDecoder(), CONTEXT, PLENTY)
    read(cache, words(1))
    assert read(cache, words(1)) == len(words(1)) - 1


def test_a_short_tail_is_forgotten_and_a_long_one_kept() -> None:
    decoder = CountingDecoder()
    cache = PrefixCache(decoder, CONTEXT, PLENTY)
    read(cache, [*words(1, 40), *words(2, 40)])
    assert read(cache, [*words(1, 40), *words(3, 41)]) == 40
    assert len(decoder.contexts) == 1
    assert read(cache, [*words(1, 40), *words(4, 40)]) == 40
    assert len(decoder.contexts) == 2
    assert read(cache, [*words(1, 40), *words(3, 41), 0]) == 81
    assert read(cache, [*words(1, 40), *words(4, 40), 0]) == 80


def test_other_pictures_are_other_prompts_even_where_they_look_alike() -> None:
    cache = PrefixCache(CountingDecoder(), CONTEXT, PLENTY)
    twin = VisionResult(PICTURES[0].features.copy(), None, None, (1, 1))
    read(cache, [*words(1), PICTURES[0], *words(2)])
    assert read(cache, [*words(1), PICTURES[1], *words(2)]) == 40
    assert read(cache, [*words(1), twin, *words(2)]) == 40


def test_what_all_prompts_of_a_template_begin_with_is_not_worth_a_copy() -> None:
    decoder = CountingDecoder()
    cache = PrefixCache(decoder, CONTEXT, PLENTY)
    read(cache, [*words(1, LEAST_SHARED_TOKENS - 1), *words(2)])
    assert read(cache, [*words(1, LEAST_SHARED_TOKENS - 1), *words(3)]) == 0
    assert read(cache, [*words(1, LEAST_SHARED_TOKENS - 1), *words(2), 0]) == LEAST_SHARED_TOKENS - 1 + 40
    assert len(decoder.contexts) == 2


def test_the_least_recently_used_makes_room() -> None:
    decoder = CountingDecoder()
    cache = PrefixCache(decoder, CONTEXT, 2 * BLOCK_BYTES)
    read(cache, words(1))
    read(cache, words(2))
    read(cache, words(1))
    read(cache, words(3))
    assert len(decoder.contexts) == 2
    assert read(cache, words(1)) == 39
    assert read(cache, words(2)) == 0


def test_what_is_larger_than_the_room_is_not_kept_and_drives_nothing_out_for_long() -> None:
    decoder = CountingDecoder()
    cache = PrefixCache(decoder, CONTEXT, BLOCK_BYTES)
    for _ in range(2):
        assert read(cache, words(1, BLOCK_TOKENS + 1)) == 0
        assert (cache.size_bytes, len(decoder.contexts)) == (0, 0)
    read(cache, words(2))
    assert read(cache, words(2)) == 39


def test_nothing_is_kept_where_there_is_no_room() -> None:
    decoder = CountingDecoder()
    cache = PrefixCache(decoder, CONTEXT, 0)
    assert [read(cache, words(1)) for _ in range(3)] == [0, 0, 0]
    assert not decoder.contexts


def test_a_picture_counts_where_it_is_kept() -> None:
    cache = PrefixCache(CountingDecoder(), CONTEXT, PLENTY)
    read(cache, [*words(1), PICTURES[0], PICTURES[0]])
    assert cache.size_bytes == BLOCK_BYTES + PICTURES[0].size_bytes


def test_a_decoder_with_one_graph_has_one_context() -> None:
    """One more would decode without the graph, and so would a larger copy: it is as large as it can get at once."""
    decoder = OneAtATime()
    cache = PrefixCache(decoder, CONTEXT, PLENTY)
    for prompt, known in [
        (words(1), 0),
        (words(1, 300), 40),
        ([*words(1), *words(2, 300)], 40),  # a copy would have been worth it
        (words(3), 0),
        (words(1), 0),
    ]:
        assert read(cache, prompt) == known
        assert [context.capacity for context in decoder.contexts] == [CONTEXT]


PIECES: list[list[Item]] = [words(seed, count) for seed, count in ((1, 3), (2, 20), (3, 20), (4, 60))]
PIECES += [[picture] for picture in PICTURES]
STEPS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(range(len(PIECES))), min_size=1, max_size=6),
        st.integers(0, 300),
        st.sampled_from(["read", "leave", "break"]),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(STEPS, st.sampled_from([CountingDecoder, OneAtATime]), st.floats(0, 6))
def test_any_course_of_prompts_is_read_as_anew(
    steps: list[tuple[list[int], int, str]], make: type[CountingDecoder], blocks: float
) -> None:
    """Prompts that share beginnings, and answers that end, are left in the midst, or break the device."""
    decoder = make()
    max_bytes = int(blocks * BLOCK_BYTES)
    cache = PrefixCache(decoder, CONTEXT, max_bytes)
    for pieces, room, end in steps:
        prompt = [item for piece in pieces for item in PIECES[piece]]
        if end == "read":
            read(cache, prompt, words(5, 7))
        else:
            prefix = cache.take(prompt, token_count(prompt) + room)
            assert prefix.context.capacity >= token_count(prompt) + room
            common = len(prefix.items)
            assert prefix.items == prompt[:common]
            if end == "leave":
                prefix.context.append(embed(prompt[common:]))
                prefix.hold(prompt)
            else:
                prefix.hold(prompt)
                assert prefix.items == prompt[:common]
            cache.put(prefix)
            del prefix
        assert cache.size_bytes <= max_bytes
        assert sum(context.cache_bytes for context in decoder.contexts) <= max_bytes
        assert decoder.contexts_at_once is None or len(decoder.contexts) <= decoder.contexts_at_once


@pytest.mark.parametrize("items", [[], [5], words(1)])
def test_a_reading_holds_what_was_read_and_no_more(items: list[Item]) -> None:
    prefix = Prefix(FakeDecoder(HIDDEN, VOCAB).start(CONTEXT))
    if items:
        prefix.context.append(embed(items))
    prefix.hold([*items, 1])
    assert (prefix.items, prefix.context.length) == ([], 0)
    prefix = Prefix(FakeDecoder(HIDDEN, VOCAB).start(CONTEXT))
    prefix.context.append(embed([*items, 1]))
    prefix.hold(items)
    assert (prefix.items, prefix.context.length) == (items, len(items))
    fork = prefix.fork(len(items) // 2)
    assert fork.items == items[: len(items) // 2]
    assert prefix.items == items
