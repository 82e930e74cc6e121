"""llguidance's objects, made of text alone: what the trial's process and the model's process do alike.

``source`` is the JSON of one grammar as llguidance takes it: ``{"json_schema": ...}`` or ``{"lark_grammar": ...}``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from vz_edge.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# A model that was trained on "ASSISTANT: Yes" begins its answers with a space; it is no part of the answer.
WITH_SPACE = {"lark_grammar": 'start: " "? @answer'}


def token_table(tokenizer_json: str, size: int, stop_ids: list[int]) -> LLTokenizer:
    """The bytes of a tokenizer's tokens, ``size`` of them. Raises ImportError without llguidance."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer_json, n_vocab=size, eos_token=stop_ids or None)


def new_matcher(table: LLTokenizer, source: str) -> tuple[bool, LLMatcher]:
    """Whether a space in front is skipped, and the grammar with that space. Raises RequestError."""
    from llguidance import LLMatcher

    grammar = json.loads(source)
    bare = LLMatcher(table, json.dumps({"grammars": [grammar]}), log_level=0)
    if bare.is_error():
        raise RequestError(f"the schema cannot be followed: {undrawn(bare.get_error())}; correct or simplify it")
    space = table.tokenize_bytes(b" ")
    if bare.validate_tokens(space) == len(space):  # the answer itself may begin with a space
        return False, bare
    spaced = json.dumps({"grammars": [WITH_SPACE, {**grammar, "name": "answer"}]})
    return True, LLMatcher(table, spaced, log_level=0)


def undrawn(reason: str) -> str:
    """A reason of llguidance's in one line: it draws them over many, with a mark below the place."""
    return " ".join(line.strip() for line in reason.splitlines() if line.strip(" ^|"))
