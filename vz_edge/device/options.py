"""The options of a question, checked, before anything is read."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from vz_edge.bundle import StopSpec
from vz_edge.device.choices import Choices, cut_choices
from vz_edge.device.generate import Limits
from vz_edge.device.guide import GrammarCompiler, Schema
from vz_edge.device.sampling import Sampling
from vz_edge.errors import RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class AskOptions(TypedDict, total=False):
    """The options of ``EdgeModel.ask``, which says what they mean, shared by all that ask."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: Sequence[str | int]
    deadline_sec: float | None
    schema: Schema | None
    logprobs: bool


def check_options(
    own_stop: StopSpec,
    tokenizer: Tokenizer,
    compiler: GrammarCompiler,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str | int] = (),
    deadline_sec: float | None = None,
    schema: Schema | None = None,
    logprobs: bool = False,
) -> tuple[Limits, Choices | None]:
    """Limits that start now and, where ``schema`` is a list, its choices. Raises RequestError, DependencyError."""
    started = time.perf_counter()
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens {max_new_tokens} is impossible; expected 1 or more")
    if deadline_sec is not None and not deadline_sec > 0:
        raise RequestError(f"deadline_sec {deadline_sec} is impossible; expected more than 0, or none")
    stops = [stop] if isinstance(stop, str) else stop
    for item in stops:
        if not isinstance(item, (str, int)):
            raise RequestError(f"stop {item!r} is impossible; expected strings, and token ids as Python's int")
    if "" in stops:
        raise RequestError("a stop string is empty, which ends every answer at once; leave it out")
    if schema is not None and stops:
        raise RequestError("stop and schema were both given; leave stop out: the schema says where an answer ends")
    choices = cut_choices(tokenizer, schema) if isinstance(schema, (list, tuple)) else None
    if choices is not None and choices.longest > max_new_tokens:
        raise RequestError(
            f"a choice has {choices.longest} tokens, max_new_tokens is {max_new_tokens}; raise max_new_tokens"
        )
    limits = Limits(
        max_new_tokens if choices is None else choices.longest,
        Sampling(temperature, top_k, top_p, seed),
        frozenset([*own_stop.token_ids, *(item for item in stops if isinstance(item, int))]),
        # What a schema asks for may have a stop string in it.
        (*own_stop.strings, *(item for item in stops if isinstance(item, str))) if schema is None else (),
        math.inf if deadline_sec is None else started + deadline_sec,
        logprobs,
        None if schema is None or choices is not None else compiler.compile(schema),
    )
    return limits, choices
