"""Answers as data: a grammar says which tokens may come next, so that an answer cannot be anything else.

A schema becomes a grammar of llguidance (https://github.com/guidance-ai/llguidance), which before each token gives
the set of those that can still lead to an answer; the others are left out before one is chosen.

>>> compiler = GrammarCompiler(tokenizer, vocab_size=32064, stop_ids=(2,))
>>> guide = compiler.compile({"type": "object", "properties": {"door": {"enum": ["open", "shut"]}}}).start()
>>> token_id = sample(guide.mask(logits), settings, rng)
>>> guide.take(token_id)
"""

from __future__ import annotations

import codecs
import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vz_edge.arguments import shown as described
from vz_edge.arguments import text as checked_text
from vz_edge.device.grammar_trial import GrammarTrial
from vz_edge.device.matcher import new_matcher, token_table, undrawn
from vz_edge.device.process import one_line
from vz_edge.device.requirements import install_command
from vz_edge.device.schema_bounds import check_bytes, check_depth
from vz_edge.errors import AnswerError, DependencyError, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Lark:
    """A schema in the language of Lark grammars; ``start`` is its first rule.

    The dialect is llguidance's: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
    """

    text: str

    def __post_init__(self) -> None:
        checked_text("the grammar of Lark", self.text)


Schema = Mapping[str, Any] | type | Sequence[str] | re.Pattern[str] | Lark

# How json.dumps writes: one way to write a value, so that what is between values is never a choice.
JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
INLINE_FLAGS = {re.IGNORECASE: "i", re.DOTALL: "s"}  # those that mean the same in both dialects
KEPT_GRAMMARS = 32
SHOWN_CHARACTERS = 60  # of an answer, in an error


@dataclass(frozen=True)
class Grammar:
    """A schema that is understood: any number of answers can be begun, in any thread.

    ``parse`` makes the value of a whole answer's text and raises ValueError for one that the schema still refuses.
    """

    parse: Callable[[str], Any]
    skips_space: bool
    _matcher: LLMatcher
    _table: LLTokenizer

    def start(self) -> Guide:
        """The grammar before an answer's first token."""
        return Guide(self._matcher.deep_copy(), self._table, self.skips_space)


class Guide:
    """Where one answer stands in its grammar. For one thread.

    It is its own detokenizer: an answer's text is the bytes that the grammar has read, less the space in front.
    """

    def __init__(self, matcher: LLMatcher, table: LLTokenizer, skips_space: bool) -> None:
        self._matcher = matcher
        self._table = table
        self._at_space = skips_space
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def done(self) -> bool:
        """Whether the answer is whole and nothing can follow but a stop token."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """A copy of logits [vocab] with minus infinity for each token that may not come next. Raises AnswerError."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").astype(bool)
        if self._matcher.is_stopped() or not allowed.any():
            raise self._stuck()
        return np.where(allowed, logits, -np.inf)

    def take(self, token_id: int) -> None:
        """Go on by a token that was allowed. Raises AnswerError where the grammar became too large to follow."""
        if not self._matcher.consume_token(token_id):
            raise self._stuck()

    def forced(self) -> list[int]:
        """The tokens that must come next, because the grammar leaves no choice; empty where it does."""
        return self._matcher.compute_ff_tokens()

    def push(self, token_id: int) -> str:
        """As Detokenizer.push."""
        text = self._characters.decode(self._table.decode_bytes([token_id]))
        if self._at_space and text:
            self._at_space, text = False, text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """As Detokenizer.flush."""
        return self._characters.decode(b"", final=True)

    def _stuck(self) -> AnswerError:
        reason = undrawn(self._matcher.get_error().split("<state>")[0]) or "none of the model's tokens can follow"
        return AnswerError(f"the answer cannot go on as its schema says ({reason}); simplify the schema")


class GrammarCompiler:
    """Makes grammars over one model's tokens. May be shared between threads.

    The table of tokens, which llguidance builds from tokenizer.json, is made with the first grammar. The last
    grammars are kept, as a program asks the same things again and again. ``vocab_size`` is the number of logits,
    ``stop_ids`` are what may end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = list(stop_ids)
        self._table: LLTokenizer | None = None
        self._trial: GrammarTrial | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[bool, LLMatcher]] = OrderedDict()

    def compile(self, schema: Any, within_sec: float = math.inf) -> Grammar:
        """The grammar of a JSON schema, a pydantic model, a regular expression or a Lark grammar.

        One that is not kept is tried in a process of its own first (``grammar_trial``), for ``within_sec`` at most.
        Raises RequestError for what is none of these, has no grammar or needs too much of the machine, and
        DependencyError without llguidance.
        """
        table = self._shared_table()
        source, parse = grammar_source(schema)
        written = json.dumps(source)
        check_bytes(written)
        return Grammar(parse, *self._matcher(written, within_sec), table)

    def close(self) -> None:
        """End the process in which grammars are tried."""
        if self._trial is not None:
            self._trial.close()

    def _matcher(self, source: str, within_sec: float) -> tuple[bool, LLMatcher]:
        """Whether a space in front is skipped, and the grammar with that space."""
        with self._lock:
            if kept := self._kept.get(source):
                self._kept.move_to_end(source)
                return kept
        table = self._shared_table()
        assert self._trial is not None
        is_small = self._trial.check(source, within_sec)
        compiled = new_matcher(table, source)
        with self._lock:
            if is_small:
                self._kept[source] = compiled
            while len(self._kept) > KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        return compiled

    def _shared_table(self) -> LLTokenizer:
        try:
            import llguidance  # noqa: F401
        except ImportError as error:
            raise DependencyError(
                f"schema needs the package llguidance ({error}); {install_command('schema')}, or give a list of "
                "choices, which does not"
            ) from error
        with self._lock:
            if self._table is None:
                # Tokens beyond the logits are in the table and never allowed; logits beyond the tokens neither.
                size = max(self._vocab_size, self._tokenizer.get_vocab_size())
                tokenizer_json = self._tokenizer.to_str()
                self._table = token_table(tokenizer_json, size, self._stop_ids)
                self._trial = GrammarTrial(tokenizer_json, size, self._stop_ids)
            return self._table


def grammar_source(schema: Any) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """A schema as llguidance takes it, and what makes a value of an answer's text. Raises RequestError."""
    if isinstance(schema, Mapping):
        return _json_source(dict(schema)), json.loads
    if isinstance(schema, re.Pattern):
        return _regex_source(schema), lambda text: _matched(schema, text)
    if isinstance(schema, Lark):
        return {"lark_grammar": schema.text}, str
    if hasattr(schema, "model_json_schema") and hasattr(schema, "model_validate_json"):
        return _json_source(_closed(_schema_of(schema))), schema.model_validate_json
    raise RequestError(
        f"schema {described(schema)} is not understood; expected a JSON schema (dict), a pydantic model, a list "
        "of choices, a compiled regular expression or vz_edge.Lark"
    )


def shown(text: str) -> str:
    """The end of an answer, quoted, for an error."""
    return repr(text if len(text) <= SHOWN_CHARACTERS else "…" + text[-SHOWN_CHARACTERS:])


def _json_source(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the schema is not JSON ({error}); write it as json.loads would return it") from error
    check_depth(schema)
    layout = schema.get("x-guidance", {})
    if not isinstance(layout, Mapping):
        raise RequestError(f"x-guidance of the schema is {layout!r}; expected an object of llguidance's options")
    return {"json_schema": {**schema, "x-guidance": {**JSON_LAYOUT, **layout}}}


def _schema_of(model: Any) -> Any:
    """The JSON schema of a pydantic model, whose fields may be of types that have none."""
    try:
        return model.model_json_schema()
    except Exception as error:  # whatever a model's own code raises
        raise RequestError(
            f"the pydantic model {described(model)} has no JSON schema ({one_line(error)}); change its fields"
        ) from error


def _closed(schema: Any) -> Any:
    """A pydantic model's schema without room for fields that it does not name, which it would drop."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if schema.get("type") == "object" and "properties" in schema:
        closed.setdefault("additionalProperties", False)
    return closed


def _regex_source(pattern: re.Pattern[Any]) -> dict[str, Any]:
    from llguidance import LLMatcher

    if not isinstance(pattern.pattern, str):
        raise RequestError(f"the regular expression {pattern.pattern!r} is one of bytes; write it as a string")
    flags = re.RegexFlag(pattern.flags) & ~re.UNICODE
    letters = "".join(letter for flag, letter in INLINE_FLAGS.items() if flags & flag)
    if other := flags & ~re.IGNORECASE & ~re.DOTALL:
        raise RequestError(f"the regular expression has {other!r}, which no schema takes; IGNORECASE and DOTALL can be")
    check_bytes(pattern.pattern)
    source = f"(?{letters}){pattern.pattern}" if letters else pattern.pattern
    return json.loads(LLMatcher.grammar_from_regex(source))["grammars"][0]


def _matched(pattern: re.Pattern[str], text: str) -> str:
    if pattern.fullmatch(text) is None:
        raise ValueError(f"Python's re does not match it with {pattern.pattern!r}")
    return text
