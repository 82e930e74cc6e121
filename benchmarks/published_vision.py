"""The vision part in torch, as people run it: the published way, and the best that torch does without changes.

``published``: what the published VisionZip does to LLaVA. The whole CLIP tower of transformers runs with eager
attention and hands out the attention matrices of every layer; hidden state -2 is reduced by the scores of the
same layer, then projected. ``sdpa``: the same result with torch's fused attention, no attention matrix kept,
the scores from one CLS query row and the last layer left out.

Both read the random checkpoint that the ONNX graphs were made from, in float32; ``published_features`` takes a tower
that is there, of any precision and on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

from vz_edge.budget import TokenBudget
from vz_edge.host.families import llava_next
from vz_edge.host.select.visionzip import cls_scores, mean_keys, select
from vz_edge.recipe import ModelSpec

if TYPE_CHECKING:
    from vz_edge.host.checkpoint import Checkpoint

Features = Callable[[torch.Tensor, int], torch.Tensor]


def published(checkpoint: Checkpoint, model: ModelSpec, budget: TokenBudget) -> Features:
    """Features of ``pixel_values`` [tiles, 3, S, S] and the grid's width in tiles: [tiles * budget, hidden]."""
    return published_features(_tower(checkpoint, model, "eager"), _projector(checkpoint), model, budget)


def published_features(tower: Any, project: torch.nn.Module, model: ModelSpec, budget: TokenBudget) -> Features:
    """The same with a CLIP ``tower`` of transformers that has eager attention; a hook stays on it."""
    layers = getattr(tower, "vision_model", tower).encoder.layers  # one module deeper in early releases of 5
    keys = _record(layers[-2].self_attn.k_proj)

    def features(pixel_values: torch.Tensor, grid_width: int) -> torch.Tensor:
        output = tower(pixel_values, output_hidden_states=True, output_attentions=True)
        scores = output.attentions[-2][:, :, 0, 1:].sum(dim=1)
        return _reduce(output.hidden_states[-2], scores, keys[0], model, budget, grid_width, project)

    return features


def sdpa(checkpoint: Checkpoint, model: ModelSpec, budget: TokenBudget) -> Features:
    """As ``published``, with fused attention and without the last layer."""
    tower = _tower(checkpoint, model, "sdpa")
    project = _projector(checkpoint)
    queries, keys = (_record(getattr(tower.encoder.layers[-2].self_attn, name)) for name in ("q_proj", "k_proj"))

    def features(pixel_values: torch.Tensor, grid_width: int) -> torch.Tensor:
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        scores = cls_scores(queries[0][:, 0], keys[0], model.tower.heads)
        return _reduce(hidden, scores, keys[0], model, budget, grid_width, project)

    return features


def _reduce(
    hidden: torch.Tensor,
    scores: torch.Tensor,
    keys: torch.Tensor,
    model: ModelSpec,
    budget: TokenBudget,
    grid_width: int,
    project: torch.nn.Module,
) -> torch.Tensor:
    found = select(hidden, scores, mean_keys(keys, model.tower.heads), budget)
    tokens = torch.cat((found.dominant, found.contextual), dim=1)
    if model.family == "llava_next":
        return project(llava_next.arrange(tokens, found.kept, grid_width, model.tower.patches_per_side))
    return project(tokens.flatten(0, 1))


def _tower(checkpoint: Checkpoint, model: ModelSpec, attention: Literal["eager", "sdpa"]) -> torch.nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = model.tower
    config = CLIPVisionConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        hidden_act=shape.activation,
        layer_norm_eps=shape.layer_norm_eps,
        attn_implementation=attention,
    )
    tower = CLIPVisionModel(config).eval()
    tower.load_state_dict({name: checkpoint.load(f"vision_tower.{name}").float() for name in tower.state_dict()})
    return tower


def _projector(checkpoint: Checkpoint) -> torch.nn.Module:
    def linear(name: str) -> torch.nn.Linear:
        weight, bias = (checkpoint.load(f"multi_modal_projector.{name}.{part}").float() for part in ("weight", "bias"))
        layer = torch.nn.Linear(*weight.shape[::-1])
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer

    return torch.nn.Sequential(linear("linear_1"), torch.nn.GELU(), linear("linear_2"))


def _record(module: torch.nn.Module) -> list[torch.Tensor]:
    """A list whose only item is what the module returned last."""
    last: list[torch.Tensor] = []
    module.register_forward_hook(lambda _module, _inputs, output: last.__setitem__(slice(None), [output]))
    return last
