"""What an answer is: its text, why it ended, how many tokens and how many seconds it took."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from vz_edge.arguments import shown
from vz_edge.errors import VzEdgeError


@dataclass(frozen=True, repr=False)
class Reply:
    """An answer with its measurements.

    ``prompt_tokens`` are the text's alone, ``image_tokens`` the pictures'; of both, ``cached_tokens`` were in the KV
    cache before the call. ``answer_tokens`` counts all that were generated, the stop token included (``token_ids``).
    Seconds are those spent in this call: a picture that was encoded before costs nothing again. ``decode_sec`` runs
    from the first token to the last.

    ``value`` is the answer as data where a ``schema`` was given; ``probabilities`` are those of each choice of a list.
    ``logprobs``, where they were asked for, are the natural logarithms of the probability that the model itself gave
    each of ``token_ids``: at temperature 1, before a schema or ``top_k`` and ``top_p`` left any out.
    """

    text: str
    finish_reason: Literal["stop", "length", "deadline"]
    token_ids: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    preprocess_sec: float
    vision_sec: float
    prefill_sec: float
    decode_sec: float
    value: Any = None
    logprobs: tuple[float, ...] | None = None
    probabilities: Mapping[str, float] | None = None

    @property
    def answer_tokens(self) -> int:
        """Tokens generated, the stop token included."""
        return len(self.token_ids)

    @property
    def ttft_sec(self) -> float:
        """Time to first token: from the call to the first token's choice."""
        return self.preprocess_sec + self.vision_sec + self.prefill_sec

    @property
    def total_sec(self) -> float:
        """From the call to the last token."""
        return self.ttft_sec + self.decode_sec

    @property
    def prefill_tokens_per_sec(self) -> float:
        """Prompt and picture tokens read a second; cached ones were not read."""
        read = self.prompt_tokens + self.image_tokens - self.cached_tokens
        return read / self.prefill_sec if self.prefill_sec else 0.0

    @property
    def decode_tokens_per_sec(self) -> float:
        """Tokens written a second, the first one, which prefill gives, not counted."""
        return (self.answer_tokens - 1) / self.decode_sec if self.answer_tokens > 1 and self.decode_sec else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All fields and what is computed from them, as ``json.dumps`` takes them.

        A ``value`` of a pydantic model is written as that model writes JSON.
        """
        value = self.value.model_dump(mode="json") if hasattr(self.value, "model_dump") else self.value
        computed = ("answer_tokens", "ttft_sec", "total_sec", "prefill_tokens_per_sec", "decode_tokens_per_sec")
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "token_ids": list(self.token_ids),
            "value": value,
            "logprobs": None if self.logprobs is None else list(self.logprobs),
            "probabilities": None if self.probabilities is None else dict(self.probabilities),
            **{name: getattr(self, name) for name in computed},
        }

    def __repr__(self) -> str:
        value = "" if self.value is None else f", value={shown(self.value)}"
        return (
            f"Reply({shown(self.text)}, {self.finish_reason!r}{value}, {self.image_tokens} image and "
            f"{self.prompt_tokens} prompt tokens ({self.cached_tokens} cached), {self.answer_tokens} answer tokens, "
            f"ttft {self.ttft_sec:.3f} s, {self.decode_tokens_per_sec:.1f} tokens a second)"
        )


class Stream(Iterator[str]):
    """The pieces of an answer as they come; ``reply`` is the whole of it, with its measurements.

    >>> for piece in (stream := model.stream("street.jpg", "What is this?")):
    ...     print(piece, end="", flush=True)
    >>> stream.reply.decode_tokens_per_sec
    """

    def __init__(self, pieces: Generator[str, None, Reply]) -> None:
        self._pieces = pieces
        self._reply: Reply | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._reply = self._reply or end.value
            raise

    def close(self) -> None:
        """End the answer here: nothing more of it is generated. An answer that was at its end keeps its ``reply``.

        For the thread that reads the pieces, between two of them.
        """
        self._pieces.close()

    @property
    def reply(self) -> Reply:
        """The finished answer; generates what is left of it if need be."""
        for _ in self:
            pass
        if self._reply is None:
            raise VzEdgeError("the answer broke off or was closed before its end, so there is no reply; ask again")
        return self._reply
