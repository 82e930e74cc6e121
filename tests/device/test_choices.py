"""Choices are weighed as the model would write them, and exactly: compared with counting all that it could write."""

from __future__ import annotations

import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.device import standin
from tests.device.test_model import PICTURE, QUESTIONS, TickingDecoder
from tests.device.test_session import varied
from vz_edge.device.choices import choice_probabilities, cut_choices
from vz_edge.device.fake_decoder import FakeContext, FakeDecoder
from vz_edge.device.model import EdgeModel
from vz_edge.device.prompt import messages_of
from vz_edge.errors import AnswerError, RequestError

LETTERS = "ab "
LONGEST = 4


class LettersDecoder(FakeDecoder):
    """Writes nothing but a few letters, so that all it can write can be counted."""

    def start(self, capacity: int) -> FakeContext:
        return LettersContext(self, capacity)


class LettersContext(FakeContext):
    def append(self, embeds: np.ndarray) -> np.ndarray:
        logits = super().append(embeds)
        ids = [standin.byte_tokenizer().encode(letter).ids[-1] for letter in LETTERS]
        masked = np.full_like(logits, -1e9)
        masked[ids] = logits[ids]
        return masked


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def counted(model: EdgeModel, choices: list[str]) -> dict[str, float]:
    """Every text of LONGEST letters, as probable as the model makes it, goes to the longest choice it begins with."""
    prompt = model.embedding.rows(model.chat.ids(messages_of("?", 0)))
    ids = {letter: model.chat.tokenizer.encode(letter).ids[-1] for letter in LETTERS}
    behind = {}
    for length in range(LONGEST):
        for letters in itertools.product(LETTERS, repeat=length):
            embeds = np.concatenate([prompt, model.embedding.rows([ids[letter] for letter in letters])])
            behind["".join(letters)] = softmax(model.decoder.start(len(embeds)).append(embeds))
    forms = {space: [space + choice for choice in choices] for space in ("", " ")}
    firsts = {space: sum(behind[""][ids[letter]] for letter in {form[0] for form in forms[space]}) for space in forms}
    form = forms[max(firsts, key=lambda space: firsts[space])]
    totals = dict.fromkeys(form, 0.0)
    for letters in itertools.product(LETTERS, repeat=LONGEST):
        text = "".join(letters)
        begun = [choice for choice in form if text.startswith(choice)]
        if begun:
            totals[max(begun, key=len)] += np.prod([behind[text[:i]][ids[text[i]]] for i in range(LONGEST)])
    return {choice.strip(): value / sum(totals.values()) for choice, value in totals.items()}


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "ab", "a b", "aab", "bba", "bb", "aba"]), min_size=1, unique=True),
    st.integers(0, 99),
)
def test_probabilities_are_those_of_counting_all_that_the_model_could_write(
    model: EdgeModel, choices: list[str], seed: int
) -> None:
    decoder = LettersDecoder(standin.HIDDEN, standin.VOCAB, seed)
    letters = varied(model, decoder=decoder)
    reply = letters.ask(None, "?", schema=choices)
    assert reply.probabilities == pytest.approx(counted(letters, choices), abs=1e-6)
    assert sum(reply.probabilities.values()) == pytest.approx(1)
    assert list(reply.probabilities) == choices
    assert reply.value == reply.text == max(choices, key=lambda choice: reply.probabilities[choice])
    assert letters.chat.tokenizer.decode(list(reply.token_ids)).strip() == reply.text


def test_a_choice_that_begins_another_has_what_the_longer_one_leaves() -> None:
    totals = {(1,): np.log(0.5), (1, 2): np.log(0.2), (1, 2, 3): np.log(0.15), (1, 4): np.log(0.1), (5,): np.log(0.3)}
    own = {(1,): 0.2, (1, 2): 0.05, (1, 2, 3): 0.15, (1, 4): 0.1, (5,): 0.3}
    assert choice_probabilities(totals) == pytest.approx({tokens: value / 0.8 for tokens, value in own.items()})
    unlikely = choice_probabilities({(1,): -2000.0, (2, 3): -2001.0})
    assert unlikely == pytest.approx({(1,): 1 / (1 + np.exp(-1)), (2, 3): np.exp(-1) / (1 + np.exp(-1))})
    assert choice_probabilities({(1,): -3.0, (1, 2): -3.0}) == pytest.approx({(1,): 0, (1, 2): 1})


def test_what_choices_have_in_common_is_read_once(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    append = FakeContext.append
    monkeypatch.setattr(FakeContext, "append", lambda self, embeds: read.append(len(embeds)) or append(self, embeds))
    fake = varied(model)
    fake.ask(None, "?", schema=["a", "b", "c"], max_new_tokens=9)
    single = len(read)
    fake.ask(None, "?", schema=["abcd", "abce", "abx"], max_new_tokens=9)
    inner_nodes = {"a", "ab", "abc"}
    spaced = {" ", " a", " ab", " abc"}
    assert single in (1, 2)  # the prompt, and a space if this model writes one
    assert len(read) - single - 1 in (len(inner_nodes), len(spaced))


def test_a_temperature_draws_among_the_choices(model: EdgeModel) -> None:
    letters = varied(model, decoder=LettersDecoder(standin.HIDDEN, standin.VOCAB))
    choices = ["a", "b", "ab"]
    probabilities = letters.ask(None, "?", schema=choices).probabilities
    drawn = [letters.ask(None, "?", schema=choices, temperature=1, seed=seed) for seed in range(200)]
    assert all(reply.probabilities == probabilities for reply in drawn)
    frequencies = {choice: sum(reply.value == choice for reply in drawn) / len(drawn) for choice in choices}
    assert frequencies == pytest.approx(probabilities, abs=0.1)
    assert len({letters.ask(None, "?", schema=choices, temperature=1, seed=3).value for _ in range(5)}) == 1


def test_a_choice_needs_no_more_context_than_its_tokens(model: EdgeModel) -> None:
    used = model.ask(PICTURE, QUESTIONS[0], max_new_tokens=1)
    exact = used.prompt_tokens + used.image_tokens + len(" yes")
    small = EdgeModel(model.manifest, model.vision, model.chat, model.embedding, model.decoder, exact, load_sec=0.0)
    assert small.ask(PICTURE, QUESTIONS[0], schema=["yes", "no"]).value in ("yes", "no")
    stream = small.stream(PICTURE, QUESTIONS[0], schema=("yes", "no"))
    assert list(stream) == [stream.reply.value]


def test_a_deadline_before_all_are_weighed_is_an_error(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = TickingDecoder(standin.HIDDEN, standin.VOCAB)
    monkeypatch.setattr(time, "perf_counter", lambda: decoder.now)
    with pytest.raises(AnswerError, match="fewer choices"):
        varied(model, decoder=decoder).ask(None, "?", schema=["abc", "abd", "bcd"], deadline_sec=2)


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ([], "empty"),
        (["yes", ""], "''"),
        (["yes", " no"], "no white space around"),
        (["yes", 1], "expected a string"),
        (["yes", "no", "yes"], "twice"),
        (["yes", "</s>"], "cannot write the choice '</s>'"),
        (["yes", "x" * 200], "200 tokens|201 tokens"),
    ],
    ids=str,
)
def test_what_is_no_list_of_choices_is_refused(model: EdgeModel, choices: list, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        model.stream(None, "?", schema=choices)
    assert "\n" not in str(caught.value)


def sentencepiece(kind: str) -> Tokenizer:
    """Llama's kind: the space in front of a word is part of its token, and one is put in front of the text."""
    pieces = ["<unk>", "<0x0A>", "▁", "Y", "e", "s", "N", "o", ":", "A", "Ye", "Yes", "▁Yes", "No", "▁No", "▁A"]
    pairs = [["Y", "e"], ["Ye", "s"], ["▁", "Yes"], ["N", "o"], ["▁", "No"], ["▁", "A"]]
    model = {
        "type": "BPE",
        "vocab": {piece: number for number, piece in enumerate(pieces)},
        "merges": pairs,
        "byte_fallback": True,
        "unk_token": "<unk>",
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    prepend = {"type": "Prepend", "prepend": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": kind, "split": False}
    data = {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if kind == "legacy" else None,
        "pre_tokenizer": None if kind == "legacy" else metaspace,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": model,
        "added_tokens": [],
    }
    return Tokenizer.from_str(json.dumps(data))


@pytest.mark.parametrize("kind", ["legacy", "first", "never"])
def test_choices_are_cut_as_behind_a_prompt(kind: str) -> None:
    tokenizer = sentencepiece(kind)
    choices = cut_choices(tokenizer, ["Yes", "No"])
    for form, space in zip(choices.forms, ("", " "), strict=True):
        for text, tokens in zip(choices.texts, form, strict=True):
            prompt = tokenizer.encode("A:").ids
            assert tokenizer.encode("A:" + space + text).ids == [*prompt, *tokens]
    assert [[tokenizer.id_to_token(i) for i in tokens] for tokens in choices.forms[1]] == [["▁Yes"], ["▁No"]]
