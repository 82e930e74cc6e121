"""The options of a question, checked, before anything is read."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from vz_edge.arguments import flag, known_options, seconds, shown, text, whole
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


# The defaults of EdgeModel.ask.
DEFAULTS: AskOptions = {
    "max_new_tokens": 128,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "seed": None,
    "stop": (),
    "deadline_sec": None,
    "schema": None,
    "logprobs": False,
}


def check_options(
    own_stop: StopSpec, tokenizer: Tokenizer, compiler: GrammarCompiler, options: AskOptions
) -> tuple[Limits, Choices | None]:
    """Limits that start now and, where ``schema`` is a list, its choices. Raises RequestError, DependencyError."""
    started = time.perf_counter()
    known_options("a question", options, DEFAULTS)
    given: AskOptions = {**DEFAULTS, **options}
    max_new_tokens = whole("max_new_tokens", given["max_new_tokens"], least=1)
    deadline_sec = seconds("deadline_sec", given["deadline_sec"])
    stop_ids, stop_strings = _stops(given["stop"])
    schema = given["schema"]
    if schema is not None and (stop_ids or stop_strings):
        raise RequestError("stop and schema were both given; leave stop out: the schema says where an answer ends")
    choices = cut_choices(tokenizer, schema) if isinstance(schema, (list, tuple)) else None
    if choices is not None and choices.longest > max_new_tokens:
        raise RequestError(
            f"a choice has {choices.longest} tokens, max_new_tokens is {max_new_tokens}; raise max_new_tokens"
        )
    limits = Limits(
        max_new_tokens if choices is None else choices.longest,
        Sampling(given["temperature"], given["top_k"], given["top_p"], given["seed"]),
        frozenset([*own_stop.token_ids, *stop_ids]),
        # What a schema asks for may have a stop string in it.
        (*own_stop.strings, *stop_strings) if schema is None else (),
        math.inf if deadline_sec is None else started + deadline_sec,
        flag("logprobs", given["logprobs"]),
        None if schema is None or choices is not None else compiler.compile(schema, deadline_sec or math.inf),
    )
    return limits, choices


def _stops(stop: object) -> tuple[list[int], list[str]]:
    """Token ids and strings that end an answer, out of a string or a list of both."""
    items = [stop] if isinstance(stop, str) else stop
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise RequestError(f"stop {shown(stop)} is impossible; expected a list of strings and token ids")
    strings = [text("stop", item) for item in items if isinstance(item, str)]
    if "" in strings:
        raise RequestError("a stop string is empty, which ends every answer at once; leave it out")
    token_ids = [item for item in items if not isinstance(item, str)]
    for token_id in token_ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise RequestError(
                f"stop {shown(token_id)} is impossible; expected strings, and token ids as Python's int, from 0"
            )
    return token_ids, strings
