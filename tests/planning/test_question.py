"""How many tokens a picture costs in a plan: the same as on the device."""

from __future__ import annotations

import pytest

from vz_edge.budget import split_tokens
from vz_edge.device.image import tile_count, token_count
from vz_edge.errors import BudgetError, RequestError
from vz_edge.planning.question import question_of, tile_counts
from vz_edge.recipe import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_tokens_are_what_the_device_counts_for_a_picture_of_the_grids_shape(name: str) -> None:
    recipe = load_recipe(name)
    model = recipe.model
    budget = split_tokens(recipe.tokens, model.max_tiles, model.tower.patches)
    for tiles in tile_counts(model):
        sizes = [(width, height) for height, width in model.grid_pinpoints] or [(336, 336)]
        sizes = [size for size in sizes if tile_count(size, model) == tiles]
        counted = max(token_count(size, model, None) for size in sizes)
        assert question_of(model, None, tiles, 10, 1).image_tokens == counted
        kept = token_count(sizes[0], model, budget)
        assert question_of(model, recipe.tokens, tiles, 10, 1).image_tokens == kept


def test_the_largest_picture_is_the_default() -> None:
    question = question_of(load_recipe("llava-next-7b").model, None, None, prompt_tokens=70, answer_tokens=30)
    assert (question.tiles, question.image_tokens) == (5, 576 + 48 * 49)
    assert question.prefill_tokens == 2998 and question.context_tokens == 3028


def test_what_is_impossible_is_refused() -> None:
    model = load_recipe("llava-next-7b").model
    with pytest.raises(RequestError, match="6 tiles is impossible for this model; it has 3, 4 or 5"):
        question_of(model, 320, 6, 10, 1)
    with pytest.raises(RequestError, match="0 answer tokens"):
        question_of(model, 320, None, 10, 0)
    with pytest.raises(BudgetError, match="nearest: 320 or 325"):
        question_of(model, 321, None, 10, 1)
