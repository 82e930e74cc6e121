"""From logits to the next token: greedy, or drawn at a temperature from the top-k, top-p candidates.

The order is the field's: divide by the temperature, keep the k largest, of these keep the fewest whose
probabilities reach p (nucleus sampling, arXiv 1904.09751), draw.

>>> rng = np.random.default_rng(settings.seed)
>>> token_id = sample(logits, Sampling(temperature=0.7, top_p=0.9), rng)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vz_edge.arguments import number, whole
from vz_edge.errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k 0 and top_p 1 leave all candidates in.

    Raises RequestError for values that make no distribution.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        zero_or_more = "0 (greedy) or more"
        if not 0 <= number("temperature", self.temperature, zero_or_more) < float("inf"):
            raise RequestError(f"temperature {self.temperature} is impossible; expected {zero_or_more}")
        whole("top_k", self.top_k)
        if not 0 < number("top_p", self.top_p, "more than 0, at most 1") <= 1:
            raise RequestError(f"top_p {self.top_p} is impossible; expected more than 0, at most 1")
        if self.seed is not None:
            whole("seed", self.seed, most=2**64 - 1)


def sample(logits: np.ndarray, settings: Sampling, rng: np.random.Generator) -> int:
    """Choose a token id from float logits [vocab]; ``rng`` is not used when greedy."""
    if settings.temperature == 0:
        return int(logits.argmax())
    candidates, probabilities = distribution(logits, settings)
    cumulative = np.cumsum(probabilities)
    return int(candidates[np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")])


def distribution(logits: np.ndarray, settings: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Token ids that may be drawn, likeliest first, and their probabilities (float64, sum 1). Temperature above 0."""
    ids = np.arange(len(logits))
    if 0 < settings.top_k < len(logits):
        ids = np.argpartition(-logits, settings.top_k - 1)[: settings.top_k]
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    shifted = logits[ids].astype(np.float64) - float(logits[ids[0]])  # the largest becomes 0: exp cannot overflow
    with np.errstate(over="ignore"):  # at a temperature near 0: minus infinity, which is probability 0
        probabilities = np.exp(shifted / float(settings.temperature))
    probabilities /= probabilities.sum()
    if settings.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        count = int(np.count_nonzero(before < settings.top_p))
        ids, probabilities = ids[:count], probabilities[:count] / probabilities[:count].sum()
    return ids, probabilities


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities that float logits [vocab] give, at temperature 1: float64 [vocab]."""
    shifted = logits.astype(np.float64) - float(logits.max())  # the largest becomes 0: exp cannot overflow
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return result
