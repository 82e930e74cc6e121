"""Published accuracy in the recipes: the same benchmarks in all of them, and nothing impossible gets in."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vz_edge.errors import RecipeError
from vz_edge.recipe import data_folder, load_recipe, parse_recipe, recipe_names

RECIPES = {name: load_recipe(name) for name in recipe_names()}
PUBLISHED = {name: recipe.published_accuracy for name, recipe in RECIPES.items() if recipe.published_accuracy}
# Percent of vanilla, training-free, by budget (arXiv 2412.04467).
TABLE = {
    "llava-1.5-7b": {"192": 98.5, "128": 97.6, "64": 94.0},
    "llava-1.5-13b": {"192": 97.9, "128": 97.0, "64": 93.7},
    "llava-next-7b": {"640": 97.6, "320": 95.0, "160": 92.0},
    "llava-next-13b": {"640": 97.5, "320": 94.7, "160": 91.3},
}
SCIENCE_QA = {"llava-next-7b": 70.2, "llava-next-13b": 73.5}  # the same paper's memory table
TEXT_VQA = {"llava-next-7b": 61.3, "llava-next-13b": 64.3}


def test_the_recipes_have_the_published_figures() -> None:
    assert {name: found.percent_of_vanilla for name, found in PUBLISHED.items()} == TABLE
    for benchmark, scores in (("SQA", SCIENCE_QA), ("TextVQA", TEXT_VQA)):
        assert {name: PUBLISHED[name].vanilla_scores[benchmark] for name in scores} == scores


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_scores_can_be_compared(name: str) -> None:
    found = PUBLISHED[name]
    assert list(found.vanilla_scores) == list(PUBLISHED["llava-next-13b"].vanilla_scores)
    values = [found.score(tokens) for tokens in (None, *RECIPES[name].presets)]
    assert all(values) and values == sorted(values, key=lambda value: -(value or 0))
    assert found.score(20) is None


def test_the_7b_to_compare_with_is_a_recipe_that_compares_with_itself() -> None:
    for recipe in RECIPES.values():
        if recipe.vanilla_7b:
            baseline = RECIPES[recipe.vanilla_7b]
            assert baseline.vanilla_7b == baseline.name and baseline.model.family == recipe.model.family


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"percent_of_vanilla": {100: 95.0}}, r"percent_of_vanilla\.100: expected one of the presets, 640, 320, 160"),
        ({"percent_of_vanilla": {320: 0.95, 160: 950.0}}, r"percent_of_vanilla\.160 is 950; expected a percentage"),
        ({"vanilla_scores": {"MME": 1842.0}}, r"vanilla_scores\.MME is 1842; expected a percentage of at most 100"),
        ({"vanilla_scores": {}}, r"vanilla_scores is empty"),
        ({"percents": {}}, r"published_accuracy\.percents: unknown key"),
    ],
)
def test_an_impossible_figure_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    data = yaml.safe_load((data_folder("export") / "llava-next-7b.yaml").read_text())
    data["published_accuracy"] |= change
    path = tmp_path / "llava-next-7b.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(RecipeError, match=message):
        parse_recipe(path)
