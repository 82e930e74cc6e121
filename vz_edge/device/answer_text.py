"""Token ids become text while they arrive: no broken characters, no lost spaces, nothing after a stop string.

A token may be half a character (byte-level and byte-fallback vocabularies) and its leading space may be kept
or dropped depending on what stands before it, so tokens are decoded together with their predecessors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no whole character yet


class Detokenizer:
    """Turns one answer's token ids into text, piece by piece; special tokens are left out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens of the last piece, which decide how the next one joins
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        self._pending.append(token_id)
        return self._emit(final=False)

    def flush(self) -> str:
        """What is left at the end of the answer, incomplete bytes as U+FFFD."""
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        known = self._tokenizer.decode(self._context) if self._context else ""
        text = self._tokenizer.decode(self._context + self._pending)
        if len(text) <= len(known) or (text.endswith(INCOMPLETE) and not final):
            return ""
        self._context, self._pending = self._pending, []
        return text[len(known) :]


class StopStrings:
    """Cuts a text at the first stop string, holding back what might become one.

    The first is the one that is complete first, so the cut does not depend on how the text was cut in pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that can be shown; ``found`` turns true, and the rest is dropped, at a stop string."""
        if self.found:
            return ""
        self._held += text
        ends = [
            (self._held.index(stop) + len(stop), self._held.index(stop)) for stop in self._stops if stop in self._held
        ]
        if ends:
            self.found = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - self._partial_match())

    def flush(self) -> str:
        """What was held back, at the end of an answer that no stop string ended."""
        return "" if self.found else self._release(len(self._held))

    def _partial_match(self) -> int:
        """Length of the longest end of the held text that a stop string starts with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown
