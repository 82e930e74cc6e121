"""VisionZip's selection: as the published code did it, as a plain loop does it, and what holds for any input."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_cases import CHECKPOINTS, GOLDEN, Case, cases, golden_tiles, model_spec
from vz_edge.budget import TokenBudget, check_budget
from vz_edge.host.families import arrange_tokens
from vz_edge.host.select.visionzip import Selection, cls_scores, mean_keys, select

SETTINGS = settings(deadline=None, max_examples=40)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TokenBudget]:
    """Hidden states, scores and keys of some tiles, and a budget that they can give."""
    patches = draw(st.integers(4, 40))
    dominant = draw(st.integers(2, patches))
    budget = check_budget(TokenBudget(dominant, draw(st.integers(1, patches + 1 - dominant))), patches)
    tiles, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    hidden = torch.randn(tiles, 1 + patches, width, generator=random)
    return (
        hidden,
        torch.rand(tiles, patches, generator=random),
        torch.randn(tiles, 1 + patches, 5, generator=random),
        budget,
    )


def select_by_loops(
    hidden: np.ndarray, scores: np.ndarray, keys: np.ndarray, budget: TokenBudget
) -> tuple[list, np.ndarray]:
    """Kept positions and tokens of one tile, written down step by step."""
    kept = sorted([0, *(np.argsort(-scores)[: budget.dominant - 1] + 1)])
    rest = [position for position in range(len(hidden)) if position not in kept]
    targets = rest[:: max(1, len(rest) // budget.contextual)][: budget.contextual]
    members: dict[int, list[int]] = {target: [] for target in targets}
    for position in rest:
        if position not in members:
            cosines = [keys[position] @ keys[target] / np.linalg.norm(keys[target]) for target in targets]
            members[targets[int(np.argmax(cosines))]].append(position)
    merged = [hidden[t] + (hidden[members[t]].mean(axis=0) if members[t] else 0) for t in targets]
    return kept, np.stack([*hidden[kept], *merged])


@SETTINGS
@given(problems())
def test_equals_a_plain_loop(problem: tuple) -> None:
    hidden, scores, keys, budget = problem
    selection = select(*problem)
    tokens = torch.cat([selection.dominant, selection.contextual], dim=1)
    for tile in range(len(hidden)):
        kept, expected = select_by_loops(
            hidden[tile].numpy(), scores[tile].numpy(), keys[tile].double().numpy(), budget
        )
        assert selection.kept[tile].tolist() == kept
        np.testing.assert_allclose(tokens[tile], expected, atol=1e-5)


@SETTINGS
@given(problems())
def test_kept_positions_are_ascending_and_start_with_cls(problem: tuple) -> None:
    kept = select(*problem).kept
    assert kept.dtype == torch.int64
    assert (kept[:, 0] == 0).all()
    assert (kept.diff(dim=1) > 0).all()
    assert kept.max() < problem[0].shape[1]


@SETTINGS
@given(problems())
def test_every_token_is_kept_or_merged_once(problem: tuple) -> None:
    """With the identity as hidden states a token shows what it is made of."""
    _, scores, keys, budget = problem
    tiles, tokens = keys.shape[:2]
    selection = select(torch.eye(tokens).expand(tiles, -1, -1), scores, keys, budget)
    assert selection.dominant.shape == (tiles, budget.dominant, tokens)
    assert selection.contextual.shape == (tiles, budget.contextual, tokens)
    origin = torch.cat([selection.dominant, selection.contextual], dim=1)
    assert ((origin > 0).sum(dim=1) == 1).all()
    number = torch.arange(selection.contextual.shape[1])[:, None]
    assert torch.equal(selection.contextual > 0, selection.merged[:, None] == number)
    assert torch.equal((selection.dominant > 0).any(dim=1), selection.merged == -1)
    number = torch.arange(selection.contextual.shape[1])[:, None]
    assert torch.equal(selection.contextual > 0, selection.merged[:, None] == number)
    assert torch.equal((selection.dominant > 0).any(dim=1), selection.merged == -1)
    weights = selection.contextual.sum(dim=2)  # the target counts 1, its members 1 together
    assert (((weights - 1).abs() < 1e-5) | ((weights - 2).abs() < 1e-5)).all()


def test_half_precision_keeps_the_positions_of_float32() -> None:
    random = torch.Generator().manual_seed(0)
    hidden, keys = torch.randn(3, 50, 8, generator=random), torch.randn(3, 50, 8, generator=random).half()
    scores = 1 + torch.arange(49).repeat(3, 1) * 1e-5  # equal in half precision
    selection = select(hidden.half(), scores, keys, TokenBudget(6, 4))
    assert selection.kept.tolist() == [[0, 45, 46, 47, 48, 49]] * 3
    assert selection.dominant.dtype == selection.contextual.dtype == torch.float16
    exact = select(hidden.half().float(), scores, keys.float(), TokenBudget(6, 4))
    torch.testing.assert_close(selection.contextual.float(), exact.contextual, atol=2e-3, rtol=1e-3)


def test_large_values_in_half_precision_do_not_overflow() -> None:
    hidden = torch.full((1, 577, 4), 1000.0, dtype=torch.float16)
    selection = select(hidden, torch.rand(1, 576), torch.ones(1, 577, 4), TokenBudget(6, 1))
    assert (selection.contextual == 2000).all()


def test_keys_of_zeros_give_no_nan() -> None:
    selection = select(torch.randn(1, 30, 4), torch.rand(1, 29), torch.zeros(1, 30, 4), TokenBudget(6, 4))
    assert selection.contextual.isfinite().all()


@cache
def torch_model(checkpoint: str) -> torch.nn.Module:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(GOLDEN / checkpoint, attn_implementation="eager").eval()


@cache
def tower_states(checkpoint: str, image: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden state -2 of transformers' tower, its attention, and that layer's CLS query and keys."""
    tower = torch_model(checkpoint).model.vision_tower
    found: dict[str, torch.Tensor] = {}
    layer = tower.encoder.layers[-2].self_attn
    hooks = [
        getattr(layer, f"{name}_proj").register_forward_hook(
            lambda _m, _i, output, name=name: found.update({name: output})
        )
        for name in ("q", "k")
    ]
    with torch.inference_mode():
        pixels = torch.from_numpy(golden_tiles(checkpoint, image)[0])
        output = tower(pixels, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    return output.hidden_states[-2], output.attentions[-2], found["q"][:, 0], found["k"]


def golden_selection(case: Case) -> Selection:
    hidden, _, query, key = tower_states(case.checkpoint, case.image)
    heads = model_spec(case.checkpoint).tower.heads
    return select(hidden, cls_scores(query, key, heads), mean_keys(key, heads), case.budget)


@pytest.mark.parametrize("case", [case for name in CHECKPOINTS for case in cases(name)], ids=lambda case: case.name)
@torch.inference_mode()
def test_golden_positions_and_features_in_torch(case: Case) -> None:
    selection = golden_selection(case)
    np.testing.assert_array_equal(selection.kept, case.kept)
    tokens = torch.cat([selection.dominant, selection.contextual], dim=1)
    grid = golden_tiles(case.checkpoint, case.image)[1]
    ordered = arrange_tokens(model_spec(case.checkpoint), tokens, selection.kept, grid[0] if grid else None)
    case.assert_features(torch_model(case.checkpoint).model.multi_modal_projector(ordered).numpy())


def test_cls_scores_are_the_attention_of_the_cls_row() -> None:
    _, attention, query, key = tower_states("llava-next", "i0")
    scores = cls_scores(query, key, model_spec("llava-next").tower.heads)
    torch.testing.assert_close(scores, attention[:, :, 0, 1:].sum(dim=1), atol=1e-6, rtol=1e-4)
