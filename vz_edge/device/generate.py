"""The loop of an answer: prefill, then one token after another until something ends it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vz_edge.device.answer_text import Detokenizer, StopStrings
from vz_edge.device.decoder import Context
from vz_edge.device.embedding import EmbeddingTable
from vz_edge.device.guide import Grammar, Guide, shown
from vz_edge.device.process import one_line
from vz_edge.device.sampling import Sampling, log_probabilities, sample
from vz_edge.errors import AnswerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Limits:
    """How tokens are chosen and what ends an answer, besides ``max_new_tokens``: a stop token or a stop string.

    After ``deadline``, a reading of ``time.perf_counter``, no token is begun; the prefill's comes all the same.
    """

    max_new_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    deadline: float = math.inf
    logprobs: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Generation:
    """A finished answer. ``token_ids`` end with the stop token if one came; the rest is as in Reply."""

    text: str
    finish_reason: Literal["stop", "length", "deadline"]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    prefill_sec: float
    decode_sec: float
    value: Any = None
    probabilities: Mapping[str, float] | None = None


def generate(
    context: Context, embeds: np.ndarray, embedding: EmbeddingTable, tokenizer: Tokenizer, limits: Limits
) -> Generator[str, None, Generation]:
    """Read ``embeds`` [n, hidden] into the context, then yield the answer's text piece by piece.

    White space in front of an answer belongs to the prompt's layout and is left out; a grammar says itself what is in
    front. Time that the caller takes between two pieces is not counted. Raises AnswerError where an answer with a
    grammar was cut off.
    """
    guide = limits.grammar.start() if limits.grammar else None
    detokenizer, stops = guide or Detokenizer(tokenizer), StopStrings(limits.stop_strings)
    token_ids, logprobs, pieces = list[int](), list[float](), list[str]()
    cut_off: Literal["length", "deadline"] | None = None
    seconds = list[float]()  # each token's; the first one's is the prefill

    started = time.perf_counter()
    for token_id, logprob in _tokens(context, embeds, embedding, limits, guide):
        seconds.append(time.perf_counter() - started)
        token_ids.append(token_id)
        logprobs.append(logprob)
        if token_id in limits.stop_ids:
            break
        piece = stops.push(detokenizer.push(token_id))
        if piece := piece if pieces or guide else piece.lstrip():
            pieces.append(piece)
            yield piece
        if stops.found or (guide and guide.done):
            break
        if cut_off := _cut_off(len(token_ids), limits):
            break
        started = time.perf_counter()

    rest = stops.push(detokenizer.flush()) + stops.flush()
    if rest := rest if pieces or guide else rest.lstrip():
        pieces.append(rest)
        yield rest
    text = "".join(pieces)
    return Generation(
        text,
        "stop" if stops.found else cut_off or "stop",
        tuple(token_ids),
        tuple(logprobs) if limits.logprobs else None,
        prefill_sec=seconds[0],
        decode_sec=sum(seconds[1:], 0.0),
        value=_value(limits.grammar, text, cut_off, len(token_ids)) if limits.grammar else None,
    )


def _tokens(
    context: Context, embeds: np.ndarray, embedding: EmbeddingTable, limits: Limits, guide: Guide | None
) -> Iterator[tuple[int, float]]:
    """Token after token and, where they are asked for, their log-probabilities (else 0).

    What a grammar forces is not chosen, and is read at once with the next choice; for log-probabilities one by one.
    """
    rng = np.random.default_rng(limits.sampling.seed)
    forced, unread = deque[int](), list[int]()
    logits = context.append(embeds)
    while True:
        allowed = guide.mask(logits) if guide and not forced else logits
        token_id = forced.popleft() if forced else sample(allowed, limits.sampling, rng)
        if guide:
            guide.take(token_id)
            forced = forced or deque(guide.forced())
        yield token_id, float(log_probabilities(logits)[token_id]) if limits.logprobs else 0.0
        unread.append(token_id)
        if limits.logprobs or not forced:
            logits = context.append(embedding.rows(unread))
            unread.clear()


def _cut_off(count: int, limits: Limits) -> Literal["length", "deadline"] | None:
    """What ends an answer of ``count`` tokens that would go on."""
    if count == limits.max_new_tokens:
        return "length"
    return "deadline" if time.perf_counter() >= limits.deadline else None


def _value(grammar: Grammar, text: str, cut_off: Literal["length", "deadline"] | None, count: int) -> Any:
    if cut_off:
        which = f"max_new_tokens {count}" if cut_off == "length" else f"the deadline, at {count} tokens,"
        raise AnswerError(
            f"{which} ended the answer before its schema was satisfied, at {shown(text)}; allow more, or bound "
            "lengths in the schema"
        )
    try:
        return grammar.parse(text)
    except (ValueError, RecursionError) as error:
        raise AnswerError(
            f"the answer {shown(text)} follows the grammar of its schema, and the schema refuses it: "
            f"{one_line(error)}; ask again, or loosen the schema"
        ) from error
