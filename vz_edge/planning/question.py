"""What is asked of a model: how many tiles, image tokens, prompt tokens and answer tokens a prediction is about.

>>> question_of(load_recipe("llava-next-13b").model, tokens=320, tiles=5, prompt_tokens=70, answer_tokens=32)
Question(tiles=5, image_tokens=320, tokens_per_tile=64, prompt_tokens=70, answer_tokens=32)
"""

from __future__ import annotations

from dataclasses import dataclass

from vz_edge.budget import split_tokens
from vz_edge.errors import RequestError
from vz_edge.recipe import ModelSpec


@dataclass(frozen=True)
class Question:
    """One picture, one prompt, one answer. ``tokens_per_tile`` is what the projector sees of each tile."""

    tiles: int
    image_tokens: int
    tokens_per_tile: int
    prompt_tokens: int
    answer_tokens: int

    @property
    def prefill_tokens(self) -> int:
        """Tokens that the decoder reads before it writes."""
        return self.image_tokens + self.prompt_tokens

    @property
    def context_tokens(self) -> int:
        """Tokens that the KV cache must hold in the end."""
        return self.prefill_tokens + self.answer_tokens


def question_of(
    model: ModelSpec, tokens: int | None, tiles: int | None, prompt_tokens: int, answer_tokens: int
) -> Question:
    """A question with the budget ``tokens`` (a total at the model's largest tile count; None: all tokens).

    ``tiles`` is what the picture is cut into, base tile counted; None: the most the model knows. Raises BudgetError
    for an impossible budget and RequestError for an impossible tile count or number of tokens.
    """
    possible = tile_counts(model)
    count = model.max_tiles if tiles is None else tiles
    if count not in possible:
        raise RequestError(f"a picture of {count} tiles is impossible for this model; it has {_listed(possible)}")
    for name, value, least in (("prompt", prompt_tokens, 0), ("answer", answer_tokens, 1)):
        if value < least:
            raise RequestError(f"{value} {name} tokens are impossible; expected {least} or more")
    if tokens is None:
        return Question(count, all_tokens(model, count), model.all_tokens_per_tile, prompt_tokens, answer_tokens)
    budget = split_tokens(tokens, model.max_tiles, model.tower.patches)
    return Question(count, budget.total(count), budget.per_tile, prompt_tokens, answer_tokens)


def tile_counts(model: ModelSpec) -> list[int]:
    """Every number of tiles that a picture can have, base tile counted, ascending."""
    return sorted({1 + columns * rows for columns, rows in _grids(model)} or {1})


def all_tokens(model: ModelSpec, tiles: int) -> int:
    """The most image tokens that a picture of ``tiles`` tiles has without selection.

    As transformers arranges them: the base tile's patches, then each patch row of the grid with a newline after it.
    A picture of exactly the grid's shape has no padding to leave out, hence the most.
    """
    side = model.tower.patches_per_side
    grids = [(columns, rows) for columns, rows in _grids(model) if 1 + columns * rows == tiles]
    return model.all_tokens_per_tile + max((rows * side * (columns * side + 1) for columns, rows in grids), default=0)


def _grids(model: ModelSpec) -> list[tuple[int, int]]:
    side = model.tower.image_size
    return [(width // side, height // side) for height, width in model.grid_pinpoints]


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}" if len(values) > 1 else str(values[0])
