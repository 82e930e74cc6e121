"""Which model fits which device, and is it fast enough: rows of predictions, and the best ones for a device.

A row is one candidate (model, bits, budget) on one device, beside the vanilla 7B of its family: all tokens, 16 bits.

>>> candidate = Candidate(load_recipe("llava-next-13b"), 4, 320)
>>> row = plan_row(candidate, load_device("agx-orin-64"), Asked())
>>> row.fit, row.spare_bytes / 1e9, row.speedup, row.memory_ratio
('fits', 55.0..., 2.7..., 0.51...)
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vz_edge.budget import parse_tokens
from vz_edge.bundle import default_weights
from vz_edge.errors import BudgetError, ContextLengthError, RequestError
from vz_edge.planning.devices import DeviceProfile
from vz_edge.planning.predict import Prediction, memory_plan, predict
from vz_edge.planning.resident import MemoryPlan
from vz_edge.recipe import Recipe, load_recipe

Bits = Literal[4, 8, 16]
ALL_BITS: tuple[Bits, ...] = (4, 8, 16)
PROMPT_TOKENS = 70  # about a chat template's system message and a short question
ANSWER_TOKENS = 64  # what vz-edge profile measures with unless told otherwise


@dataclass(frozen=True)
class Candidate:
    """A model as it could be exported. ``tokens`` is a total at its largest tile count, None for all tokens."""

    recipe: Recipe
    bits: Bits
    tokens: int | None

    @property
    def label(self) -> str:
        """In a few words, such as "llava-next-13b, 4 bits, 320 tokens"."""
        return f"{self.recipe.name}, {self.variant}"

    @property
    def variant(self) -> str:
        """The label without the model."""
        return f"{self.bits} bits, {'all' if self.tokens is None else self.tokens} tokens"


@dataclass(frozen=True)
class Asked:
    """What every row of a plan is about: one picture, one prompt, one answer, and how many of them a minute.

    ``tiles`` None: the most the model knows; ``max_context`` tokens are what the KV cache is sized for, None: what
    the question needs.
    """

    runtime: str = "onnxruntime"
    tiles: int | None = None
    prompt_tokens: int = PROMPT_TOKENS
    answer_tokens: int = ANSWER_TOKENS
    max_context: int | None = None
    frames_per_minute: float | None = None


@dataclass(frozen=True)
class Row:
    """A candidate on a device. ``memory`` is with a KV cache for ``context_tokens``.

    ``fitting_context_tokens`` is the longest context that fits, None where not even one token can be answered;
    ``vanilla`` the vanilla 7B of the family there, None where there is none, the row is that or its context is too
    short for the question.
    """

    candidate: Candidate
    device: DeviceProfile
    prediction: Prediction
    memory: MemoryPlan
    context_tokens: int
    fitting_context_tokens: int | None
    frames_per_minute: float | None
    vanilla: Row | None = None

    @property
    def spare_bytes(self) -> int:
        """What is left of the memory that an application can have; negative: what is missing."""
        return self.device.app_memory_bytes.value - self.memory.peak_bytes

    @property
    def fit(self) -> Literal["fits", "fits with less context", "does not fit"]:
        """Whether it fits."""
        if self.spare_bytes >= 0:
            return "fits"
        return "does not fit" if self.fitting_context_tokens is None else "fits with less context"

    @property
    def score(self) -> float | None:
        """Published mean score that a budget keeps, in percent; bits are not in it."""
        published = self.candidate.recipe.published_accuracy
        return published.score(self.candidate.tokens) if published else None

    @property
    def fast_enough(self) -> bool | None:
        """Whether an answer is done before the next frame comes; None where no rate was asked for."""
        if self.frames_per_minute is None:
            return None
        return self.prediction.answer_sec <= 60 / self.frames_per_minute

    @property
    def speedup(self) -> float | None:
        """The vanilla 7B's time to first token in units of this one's."""
        return self.vanilla.prediction.ttft_sec / self.prediction.ttft_sec if self.vanilla else None

    @property
    def memory_ratio(self) -> float | None:
        """This one's peak in units of the vanilla 7B's."""
        return self.memory.peak_bytes / self.vanilla.memory.peak_bytes if self.vanilla else None

    @property
    def beats_vanilla(self) -> bool | None:
        """Whether it fits and has its first token sooner in less memory, or fits where the vanilla 7B does not."""
        if self.vanilla is None or self.speedup is None or self.memory_ratio is None:
            return None
        better = self.speedup > 1 and self.memory_ratio < 1
        return self.fit != "does not fit" and (better or self.vanilla.fit == "does not fit")


def candidates(recipes: Iterable[Recipe], bits: Sequence[int], budgets: Sequence[str]) -> list[Candidate]:
    """Every combination; ``budgets`` are totals or "all", the recipe's own default where there are none.

    Raises RequestError for bits that no export has, BudgetError for an impossible budget.
    """
    widths = [width for width in ALL_BITS if width in bits]
    if impossible := sorted(set(bits) - set(ALL_BITS)):
        raise RequestError(f"--bits {impossible[0]} is impossible; expected 4, 8 or 16")
    return [
        Candidate(recipe, width, _tokens(recipe, text))
        for recipe in recipes
        for width in widths
        for text in budgets or [str(recipe.tokens)]
    ]


def plan_row(candidate: Candidate, device: DeviceProfile, asked: Asked) -> Row:
    """Predict one row. Raises RequestError, ContextLengthError, BudgetError or DeviceError."""
    _check(asked)
    prediction = _predict(candidate, device, asked)
    row = _row(candidate, device, asked, prediction, _context(candidate, prediction, asked.max_context))
    baseline = _vanilla_7b(candidate)
    if baseline is None:
        return row
    prediction = _predict(baseline, device, asked)
    needed, longest = prediction.question.context_tokens, baseline.recipe.model.decoder.context_length
    if needed > longest:
        return row
    context = min(max(row.context_tokens, needed), longest)
    return dataclasses.replace(row, vanilla=_row(baseline, device, asked, prediction, context))


def solve(
    found: Iterable[Candidate], device: DeviceProfile, asked: Asked, within_sec: float | None = None
) -> list[Row]:
    """Rows that fit, have a first token ``within_sec`` and keep up with the frames, the best first.

    The best is the highest published score, then the soonest end of an answer; what has no published score comes after
    what has. A candidate whose tokens are more than its context holds is left out. Raises RequestError or DeviceError.
    """
    if within_sec is not None and not within_sec > 0:
        raise RequestError(f"--within-sec {within_sec:g} is impossible; expected more than 0")
    rows = []
    for candidate in found:
        try:
            row = plan_row(candidate, device, asked)
        except ContextLengthError:
            continue
        soon_enough = within_sec is None or row.prediction.ttft_sec <= within_sec
        if row.fit == "fits" and soon_enough and row.fast_enough is not False:
            rows.append(row)
    return sorted(rows, key=lambda row: (row.score is None, -(row.score or 0.0), row.prediction.answer_sec))


def _predict(candidate: Candidate, device: DeviceProfile, asked: Asked) -> Prediction:
    model, weights = candidate.recipe.model, default_weights(candidate.bits)
    tokens, tiles, runtime = candidate.tokens, asked.tiles, asked.runtime
    try:
        return predict(model, weights, tokens, tiles, device, runtime, asked.prompt_tokens, asked.answer_tokens)
    except (RequestError, BudgetError) as error:
        raise type(error)(f"{candidate.recipe.name}: {error}") from error


def _row(candidate: Candidate, device: DeviceProfile, asked: Asked, prediction: Prediction, context: int) -> Row:
    question, weights = prediction.question, default_weights(candidate.bits)

    def memory(tokens: int) -> MemoryPlan:
        longer = dataclasses.replace(question, answer_tokens=tokens - question.prefill_tokens)
        selects = candidate.tokens is not None
        return memory_plan(candidate.recipe.model, weights, longer, device, asked.runtime, selects)

    contexts = range(question.prefill_tokens + 1, context + 1)
    fitting = bisect.bisect_right(contexts, device.app_memory_bytes.value, key=lambda n: memory(n).peak_bytes)
    longest = contexts[fitting - 1] if fitting else None
    return Row(candidate, device, prediction, memory(context), context, longest, asked.frames_per_minute)


def _context(candidate: Candidate, prediction: Prediction, wanted: int | None) -> int:
    """Tokens that the cache is for: ``wanted``, or what the question needs. Raises ContextLengthError."""
    needed, longest = prediction.question.context_tokens, candidate.recipe.model.decoder.context_length
    facts = f"picture, prompt and answer are {needed} tokens, the model's context is {longest}"
    if needed > longest:
        raise ContextLengthError(f"{candidate.label}: {facts}; ask for a shorter answer or fewer tokens")
    context = needed if wanted is None else wanted
    if not needed <= context <= longest:
        raise ContextLengthError(f"{candidate.label}: --max-context {context} is impossible, since {facts}")
    return context


def _check(asked: Asked) -> None:
    rate = asked.frames_per_minute
    if rate is not None and not rate > 0:
        raise RequestError(f"--frames-per-minute {rate:g} is impossible; expected more than 0")
    if asked.max_context is not None and asked.max_context < 1:
        raise RequestError(f"--max-context {asked.max_context} is impossible; expected 1 or more")


def _vanilla_7b(candidate: Candidate) -> Candidate | None:
    """What the row is compared with; None where the family has no 7B, and for that one itself."""
    name = candidate.recipe.vanilla_7b
    vanilla = Candidate(_recipe(name), 16, None) if name else None
    return None if vanilla == candidate else vanilla


_recipe = functools.cache(load_recipe)


def _tokens(recipe: Recipe, text: str) -> int | None:
    model = recipe.model
    try:
        budget = parse_tokens(text, model.max_tiles, model.tower.patches)
    except BudgetError as error:
        raise BudgetError(f"{recipe.name}: {error}") from error
    return None if budget is None else budget.total(model.max_tiles)
