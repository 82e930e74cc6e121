"""The loop of an answer: prefill, then one token after another until something ends it."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from vz_edge.device.answer_text import Detokenizer, StopStrings
from vz_edge.device.decoder import Context
from vz_edge.device.embedding import EmbeddingTable
from vz_edge.device.sampling import Sampling, sample

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Limits:
    """How tokens are chosen and what ends an answer, besides ``max_new_tokens``: a stop token or a stop string."""

    max_new_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]


@dataclass(frozen=True)
class Generation:
    """A finished answer. ``token_ids`` end with the stop token if one came."""

    text: str
    finish_reason: Literal["stop", "length"]
    token_ids: tuple[int, ...]
    prefill_sec: float
    decode_sec: float


def generate(
    context: Context, embeds: np.ndarray, embedding: EmbeddingTable, tokenizer: Tokenizer, limits: Limits
) -> Generator[str, None, Generation]:
    """Read ``embeds`` [n, hidden] into the context, then yield the answer's text piece by piece.

    White space in front of an answer belongs to the prompt's layout and is left out. Time that the caller takes
    between two pieces is not counted.
    """
    started = time.perf_counter()
    rng = np.random.default_rng(limits.sampling.seed)
    token_id = sample(context.append(embeds), limits.sampling, rng)
    prefill_sec, decode_sec = time.perf_counter() - started, 0.0
    detokenizer, stops = Detokenizer(tokenizer), StopStrings(limits.stop_strings)
    token_ids, pieces = [token_id], list[str]()

    while token_id not in limits.stop_ids:
        piece = stops.push(detokenizer.push(token_id))
        if piece := piece if pieces else piece.lstrip():
            pieces.append(piece)
            yield piece
        if stops.found or len(token_ids) == limits.max_new_tokens:
            break
        started = time.perf_counter()
        token_id = sample(context.append(embedding.rows([token_id])), limits.sampling, rng)
        decode_sec += time.perf_counter() - started
        token_ids.append(token_id)

    rest = stops.push(detokenizer.flush()) + stops.flush()
    if rest := rest if pieces else rest.lstrip():
        pieces.append(rest)
        yield rest
    stopped = stops.found or token_id in limits.stop_ids
    return Generation("".join(pieces), "stop" if stopped else "length", tuple(token_ids), prefill_sec, decode_sec)
