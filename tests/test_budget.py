import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vz_edge.budget import TokenBudget, check_budget, parse_tokens, split_tokens
from vz_edge.errors import BudgetError


@pytest.mark.parametrize(
    ("total", "tiles", "dominant", "contextual"),
    [(64, 1, 54, 10), (128, 1, 108, 20), (192, 1, 162, 30), (160, 5, 27, 5), (320, 5, 54, 10), (640, 5, 108, 20)],
)
def test_the_papers_settings(total: int, tiles: int, dominant: int, contextual: int) -> None:
    assert split_tokens(total, tiles, 576) == TokenBudget(dominant, contextual)


@given(tiles=st.integers(1, 7), per_tile=st.integers(4, 576))
def test_every_possible_total_is_spent_to_the_token(tiles: int, per_tile: int) -> None:
    budget = split_tokens(per_tile * tiles, tiles, 576)
    assert budget.total(tiles) == per_tile * tiles
    assert budget == check_budget(budget, 576)
    assert abs(budget.dominant / per_tile - 27 / 32) <= 0.5 / per_tile + 1e-9


@given(total=st.integers(0, 4000), tiles=st.integers(1, 7))
def test_a_refusal_names_totals_that_are_possible_and_nearest(total: int, tiles: int) -> None:
    try:
        split_tokens(total, tiles, 576)
    except BudgetError as error:
        nearest = [int(n) for n in re.search(r"nearest: ([\d or]+)", str(error)).group(1).split(" or ")]
        possible = range(4 * tiles, 576 * tiles + 1, tiles)
        assert set(nearest) <= set(possible)
        assert min(abs(n - total) for n in nearest) == min(abs(n - total) for n in possible)


def test_a_refusal_names_the_option_and_all_where_there_are_such() -> None:
    with pytest.raises(BudgetError, match=r"^tokens 321 is impossible for a model of 5 tile.*nearest: 320 or 325$"):
        split_tokens(321, 5, 576)
    with pytest.raises(BudgetError, match=r"^--tokens 321 is impossible .*nearest: 320 or 325 \(or 'all'\)$"):
        parse_tokens("321", 5, 576)


@pytest.mark.parametrize(("dominant", "contextual"), [(1, 4), (577, 1), (54, 0), (570, 8), (-3, 5)])
def test_impossible_counts_a_tile_are_refused(dominant: int, contextual: int) -> None:
    with pytest.raises(BudgetError, match="choose"):
        check_budget(TokenBudget(dominant, contextual), 576)


def test_tokens_as_a_user_writes_them() -> None:
    assert parse_tokens("all", 5, 576) is None
    assert parse_tokens("320", 5, 576) == TokenBudget(54, 10)
    for text in ("", "-320", "3.5", "many"):
        with pytest.raises(BudgetError, match="whole number"):
            parse_tokens(text, 5, 576)
