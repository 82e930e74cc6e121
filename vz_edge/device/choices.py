"""One of a list: how probable each choice is, from the logits, without writing any of them.

The probability of a choice is that of its tokens one after another, p(t1) p(t2 | t1) ..., at temperature 1. It is the
probability that an answer begins with the choice, whatever comes behind it: a full stop, or a reason. Where a choice
begins another ("yes", "yes please"), an answer that begins with the longer one is that one's: its probability is
taken from the shorter's. So the events exclude each other, and the probabilities are divided by their sum:

    own(c) = p(c) - sum of own(d) over the choices d that c begins
    P(c) = own(c) / sum of own over all choices

A prompt may leave the space in front of an answer to the model ("ASSISTANT:" and " yes") or not. Which of the two a
model writes is in its logits: the form whose first tokens have more probability is weighed.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vz_edge.arguments import shown
from vz_edge.arguments import text as checked_text
from vz_edge.device.decoder import Context
from vz_edge.device.embedding import EmbeddingTable
from vz_edge.device.generate import Generation, Limits
from vz_edge.device.sampling import log_probabilities, sample
from vz_edge.errors import AnswerError, RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens = tuple[int, ...]
# What stands in front of a choice while it is cut into tokens, as the prompt will: tokenizers merge no line break with
# a letter behind it, and write the space that some put in front of a whole text in front of this.
ANCHOR = "\n"
FORMS = ("", " ")


@dataclass(frozen=True)
class Choices:
    """A list of choices and their tokens, [form][choice]: without a space in front, and with one."""

    texts: tuple[str, ...]
    forms: tuple[tuple[Tokens, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest choice."""
        return max(len(tokens) for form in self.forms for tokens in form)


def cut_choices(tokenizer: Tokenizer, texts: Sequence[str]) -> Choices:
    """Cut choices into tokens as they would be behind a prompt. Raises RequestError for a list that is none."""
    if not texts:
        raise RequestError("the list of choices is empty; expected one or more strings")
    for text in texts:
        if not checked_text("the choice", text) or text != text.strip():
            raise RequestError(f"the choice {shown(text)} is impossible; expected one with no white space around it")
    before = len(tokenizer.encode(ANCHOR, add_special_tokens=False).ids)
    forms = []
    for space in FORMS:
        cut = [tuple(tokenizer.encode(ANCHOR + space + text, add_special_tokens=False).ids[before:]) for text in texts]
        for text, tokens in zip(texts, cut, strict=True):
            if tokenizer.decode(list(tokens)).strip() != text:
                raise RequestError(f"the model's tokenizer cannot write the choice {shown(text)}; word it differently")
        if len(set(cut)) < len(cut):
            raise RequestError("a choice is in the list twice; give each of them once")
        forms.append(tuple(cut))
    return Choices(tuple(texts), tuple(forms))


def choose(
    context: Context, embeds: np.ndarray, embedding: EmbeddingTable, choices: Choices, limits: Limits
) -> Generator[str, None, Generation]:
    """Read ``embeds`` [n, hidden] into the context, weigh the choices and yield the one that is taken.

    At temperature 0 that is the likeliest, else one is drawn. Afterwards the context holds what it held and
    ``embeds``. Raises AnswerError where the deadline comes first.
    """
    started = time.perf_counter()
    first = log_probabilities(context.append(embeds))
    prefill_sec = time.perf_counter() - started
    started, length = time.perf_counter(), context.length
    form = max(choices.forms, key=lambda form: np.exp(first[sorted({tokens[0] for tokens in form})]).sum())
    logprobs = token_log_probabilities(context, embedding, first, form, limits.deadline)
    context.rewind(length)
    probabilities = choice_probabilities({tokens: sum(values) for tokens, values in logprobs.items()})
    values = np.array([probabilities[tokens] for tokens in form])
    with np.errstate(divide="ignore"):  # a probability may be too small for a number
        taken = sample(np.log(values), limits.sampling, np.random.default_rng(limits.sampling.seed))
    decode_sec = time.perf_counter() - started
    yield choices.texts[taken]
    return Generation(
        choices.texts[taken],
        "stop",
        form[taken],
        logprobs[form[taken]] if limits.logprobs else None,
        prefill_sec,
        decode_sec,
        value=choices.texts[taken],
        probabilities=dict(zip(choices.texts, values.tolist(), strict=True)),
    )


def token_log_probabilities(
    context: Context, embedding: EmbeddingTable, first: np.ndarray, sequences: Sequence[Tokens], deadline: float
) -> dict[Tokens, tuple[float, ...]]:
    """The log-probability of every token of ``sequences`` behind what the context holds.

    ``first`` [vocab] are those of the first token. In sorted order sequences that begin alike are neighbours, so
    what they have in common is read once; a last token is never read. Raises AnswerError after ``deadline``.
    """
    length = context.length
    path: list[int] = []
    rows = [first]  # behind each token of the path
    found = {}
    for tokens in sorted(sequences):
        common = next((i for i, pair in enumerate(zip(path, tokens, strict=False)) if pair[0] != pair[1]), len(path))
        del path[common:], rows[common + 1 :]
        context.rewind(length + common)
        for token_id in tokens[common:-1]:
            if time.perf_counter() >= deadline:
                raise AnswerError("the deadline came before all choices were weighed; give more time, or fewer choices")
            rows.append(log_probabilities(context.append(embedding.rows([token_id]))))
            path.append(token_id)
        found[tokens] = tuple(float(row[token_id]) for row, token_id in zip(rows, tokens, strict=False))
    return found


def choice_probabilities(totals: dict[Tokens, float]) -> dict[Tokens, float]:
    """The formula above, from the log-probability of each choice's tokens together; the result sums to 1."""
    largest = max(totals.values())  # becomes 0: they cannot all underflow
    own: dict[Tokens, float] = {}
    for tokens in sorted(totals, key=len, reverse=True):
        longer = sum(value for other, value in own.items() if other[: len(tokens)] == tokens)
        own[tokens] = max(0.0, float(np.exp(totals[tokens] - largest)) - longer)
    total = sum(own.values())
    return {tokens: value / total for tokens, value in own.items()}
