"""Streaming changes nothing: the pieces are the text, cut where the first stop string is complete."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.device.standin import byte_tokenizer
from tests.device.test_prompt import sentencepiece_tokenizer
from vz_edge.device.answer_text import Detokenizer, StopStrings

BYTES, PIECES = byte_tokenizer(), sentencepiece_tokenizer()


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@given(st.text(max_size=30))
@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "sentencepiece"])
def test_pieces_join_to_the_text_and_no_character_is_broken(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 299), max_size=30))
def test_any_byte_tokens_stream_to_what_they_decode_to(ids: list[int]) -> None:
    assert "".join(streamed(BYTES, ids)) == BYTES.decode(ids)


@given(st.lists(st.sampled_from(["▁", "a", "b", "<s>", "US", "ER", "A:", "<0xC3>", "<0xA9>"]), max_size=20))
def test_spaces_survive_between_pieces_and_special_tokens(tokens: list[str]) -> None:
    ids = [PIECES.token_to_id(token) for token in tokens]
    expected = PIECES.decode(ids)
    if "\ufffd" not in expected:
        assert "".join(streamed(PIECES, ids)) == expected


def test_a_character_is_shown_as_soon_as_it_is_whole() -> None:
    ids = BYTES.encode("é a", add_special_tokens=False).ids
    assert streamed(BYTES, ids) == ["", "é", " ", "a", ""]


def test_half_a_character_at_the_end_is_flushed() -> None:
    ids = BYTES.encode("é", add_special_tokens=False).ids
    assert streamed(BYTES, ids[:1]) == ["", "\ufffd"]


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first; of those, the longest."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_the_cut_is_at_the_first_stop_string_however_the_text_comes(chunks: list[str], stops: list[str]) -> None:
    filtered = StopStrings(stops)
    shown = ""
    for chunk in chunks:
        shown += filtered.push(chunk)
        assert not any(stop in shown for stop in stops)
    whole = "".join(chunks)
    assert shown + filtered.flush() == cut(whole, stops)
    assert filtered.found == any(stop in whole for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    filtered = StopStrings(["\nUSER:"])
    assert [filtered.push(piece) for piece in ("Yes.", "\n", "US", "A\nUSE", "R: more")] == [
        "Yes.",
        "",
        "",
        "\nUSA",
        "",
    ]
    assert filtered.found
    assert filtered.push("never shown") == filtered.flush() == ""
