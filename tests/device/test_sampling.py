"""Sampling draws from exactly the candidates its settings leave, as likely as they should be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vz_edge.device.sampling import Sampling, distribution, sample
from vz_edge.errors import RequestError

LOGITS = arrays(np.float32, st.integers(1, 40), elements=st.floats(-50, 50, width=32))
SETTINGS = st.builds(
    Sampling,
    temperature=st.floats(0.01, 10),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
)


def stock_distribution(logits: np.ndarray, settings: Sampling) -> np.ndarray:
    """transformers' logits warpers, in the order that generate() applies them: probabilities [vocab]."""
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(settings.temperature)(None, torch.from_numpy(logits.astype(np.float64))[None])
    if settings.top_k:
        scores = TopKLogitsWarper(settings.top_k)(None, scores)
    if settings.top_p < 1:
        scores = TopPLogitsWarper(settings.top_p)(None, scores)
    return scores.softmax(-1)[0].numpy()


@given(st.permutations(range(25)), SETTINGS)
def test_the_distribution_is_that_of_transformers(order: list[int], settings: Sampling) -> None:
    logits = (np.array(order) * 0.37 - 3).astype(np.float32)  # distinct: ties are broken differently
    ids, probabilities = distribution(logits, settings)
    dense = np.zeros(len(logits))
    dense[ids] = probabilities
    np.testing.assert_allclose(dense, stock_distribution(logits, settings), atol=1e-6)


@given(LOGITS, SETTINGS)
def test_candidates_are_the_likeliest_and_their_probabilities_sum_to_one(
    logits: np.ndarray, settings: Sampling
) -> None:
    ids, probabilities = distribution(logits, settings)
    assert 1 <= len(ids) <= (settings.top_k or len(logits))
    assert len(set(ids.tolist())) == len(ids)
    assert probabilities.sum() == pytest.approx(1)
    assert (np.diff(probabilities) <= 1e-12).all()
    left_out = np.setdiff1d(np.arange(len(logits)), ids)
    assert not len(left_out) or logits[left_out].max() <= logits[ids].min()
    assert sample(logits, settings, np.random.default_rng(settings.seed)) in ids


@given(LOGITS)
def test_temperature_zero_is_greedy(logits: np.ndarray) -> None:
    greedy = int(logits.argmax())
    rng = np.random.default_rng(0)
    assert sample(logits, Sampling(), rng) == greedy
    assert logits[sample(logits, Sampling(temperature=1, top_k=1), rng)] == logits[greedy]


def test_draws_are_as_frequent_as_they_should_be() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    rng = np.random.default_rng(0)
    draws = [sample(logits, Sampling(temperature=1), rng) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(draws) / 4000, [0.5, 0.3, 0.2], atol=0.03)


def test_the_seed_decides() -> None:
    logits = np.random.default_rng(5).standard_normal(100).astype(np.float32)
    settings = Sampling(temperature=1.5, seed=7)

    def draws(seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return [sample(logits, settings, rng) for _ in range(20)]

    assert draws(7) == draws(7) != draws(8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
    ids=str,
)
def test_settings_that_make_no_distribution_are_refused(wrong: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Sampling(**wrong)
