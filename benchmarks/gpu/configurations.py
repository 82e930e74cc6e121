"""What ``benchmarks.gpu`` measures: models, weights, ways of looking at a picture, and how a part of it is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Way = Literal["compress", "transformers", "published"]
Device = Literal["cuda", "cpu"]

SHAPES = {
    "full": {"7B": "llava-next-7b", "13B": "llava-next-13b"},
    "small": {"7B": "tiny", "13B": "tiny"},
}
# What the bars need comes first, and within a model the least memory. The published way leaves a hook on the tower.
MODELS = (("7B", 16), ("13B", 4), ("13B", 16), ("13B", 8), ("7B", 4), ("7B", 8))
WAYS: tuple[tuple[Way, int | None], ...] = (
    ("compress", 160),
    ("compress", 320),
    ("compress", 640),
    ("transformers", None),
    ("published", 320),
)
WEIGHTS = {16: "bf16", 8: "8-bit", 4: "4-bit"}
PROMPT_TOKENS, ANSWER_TOKENS = 70, 32


class Configuration(NamedTuple):
    """What is measured at once. ``tokens`` None: all."""

    model: str
    bits: int
    way: Way
    tokens: int | None


@dataclass(frozen=True)
class Job:
    """What one process measures: the model of that shape (benchmarks/make_checkpoint.py) with ``bits``, in ``ways``."""

    device: Device
    shape: str
    bits: int
    ways: Sequence[tuple[Way, int | None]]
    runs: int


WORDS: dict[str, tuple[str, str | int | None]] = {
    **{model: ("model", model) for model, _ in MODELS},
    **{name: ("bits", bits) for bits, name in WEIGHTS.items()},
    **{str(tokens or "all"): ("tokens", tokens) for _, tokens in WAYS},
    **{way: ("way", way) for way, _ in WAYS},
}


def configurations(words: Sequence[str]) -> list[Configuration]:
    """Those that ``words`` (of WORDS) name: of each kind of word that is there, one must be the configuration's."""
    chosen: dict[str, set[str | int | None]] = {}
    for kind, value in (WORDS[word] for word in words):
        chosen.setdefault(kind, set()).add(value)
    every = [Configuration(*model, *way) for model in MODELS for way in WAYS]
    return [one for one in every if all(getattr(one, kind) in values for kind, values in chosen.items())]
