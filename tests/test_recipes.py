"""A contract over every recipe that ships: it parses, its numbers agree with each other, its prompt works."""

from __future__ import annotations

from pathlib import Path

import pytest

from vz_edge.budget import split_tokens
from vz_edge.device.prompt import render_template
from vz_edge.errors import RecipeError
from vz_edge.recipe import Recipe, load_recipe, parse_recipe, recipe_names

PUBLISHED = {
    "llava-1.5-7b",
    "llava-1.5-13b",
    "llava-next-7b",
    "llava-next-mistral-7b",
    "llava-next-13b",
    "llava-next-34b",
    "llava-next-llama3-8b",
}
USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
ASSISTANT = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
AGAIN = {"role": "user", "content": [{"type": "text", "text": "And that?"}]}
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
EXPECTED = {
    "llava-1.5-7b": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: <image>\nWhat is this? ASSISTANT: A cat.</s>"
        "USER: And that? ASSISTANT:"
    ),
    "llava-next-mistral-7b": "[INST] <image>\nWhat is this? [/INST] A cat. </s>[INST] And that? [/INST]",
    "llava-next-34b": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is this?<|im_end|>"
        "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nAnd that?<|im_end|><|im_start|>assistant\n"
    ),
    "llava-next-llama3-8b": (
        "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are able "
        "to understand the visual content that the user provides, and assist the user with a variety of tasks using "
        "natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is this?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nAnd that?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}


@pytest.fixture(params=recipe_names())
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return load_recipe(request.param)


def render(recipe: Recipe, *messages: dict) -> str:
    return render_template(recipe.prompt.template, messages, {"bos_token": "<s>", "eos_token": "</s>"})


def test_the_published_models_are_there() -> None:
    assert set(recipe_names()) >= PUBLISHED


def test_shapes_agree(recipe: Recipe) -> None:
    tower, decoder = recipe.model.tower, recipe.model.decoder
    assert decoder.hidden_size == decoder.heads * decoder.head_dim
    assert decoder.heads % decoder.kv_heads == 0
    assert tower.hidden_size % tower.heads == 0
    assert tower.image_size % tower.patch_size == 0
    assert recipe.model.image_token_id < decoder.vocab_size
    assert bool(recipe.model.grid_pinpoints) == (recipe.model.family == "llava_next")
    for height, width in recipe.model.grid_pinpoints:
        assert height % tower.image_size == width % tower.image_size == 0


def test_the_license_of_the_weights_is_said_with_its_source(recipe: Recipe) -> None:
    assert recipe.license is not None and recipe.license.name and recipe.license.source


def test_default_and_presets_are_possible_budgets(recipe: Recipe) -> None:
    assert recipe.presets == tuple(sorted(recipe.presets, reverse=True))
    for total in (recipe.tokens, *recipe.presets):
        budget = split_tokens(total, recipe.model.max_tiles, recipe.model.tower.patches)
        assert budget.total(recipe.model.max_tiles) == total < recipe.model.decoder.context_length


def test_budgets_of_the_paper() -> None:
    assert [split_tokens(n, 1, 576).dominant for n in load_recipe("llava-1.5-7b").presets] == [162, 108, 54]
    assert [split_tokens(n, 5, 576).dominant for n in load_recipe("llava-next-7b").presets] == [108, 54, 27]


def test_prompt_places_the_picture_and_every_turn(recipe: Recipe) -> None:
    text = render(recipe, USER, ASSISTANT, AGAIN)
    assert text.count("<image>") == 1
    assert text.index("<image>") < text.index("What is this?") < text.index("A cat.") < text.index("And that?")
    # The second question must continue the first one's text, or the KV cache could not be kept.
    first = render(recipe, USER)
    assert text.startswith(first)
    assert recipe.prompt.stop[0] in text[len(first) :]


@pytest.mark.parametrize("name", EXPECTED)
def test_prompt_is_the_published_one(name: str) -> None:
    assert render(load_recipe(name), USER, ASSISTANT, AGAIN) == EXPECTED[name]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_system_message_replaces_the_default_one(name: str) -> None:
    text = render(load_recipe(name), SYSTEM, USER)
    assert "Be brief." in text
    assert text.index("Be brief.") < text.index("<image>")
    assert not any(word in text for word in ("curious human", "Answer the questions", "language and vision assistant"))


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"llava-next-13b"):
        load_recipe("llava-next-13")


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ncheckpoint: here\ntoken: 3\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: token: unknown key \(did you mean 'tokens'\?\)"):
        parse_recipe(path)
