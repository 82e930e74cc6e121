"""What the checkpoint itself computes: transformers' own layers, one layer of weights in memory at a time.

The parity check compares with it, and calibration looks at what its layers read. A 13B model does not fit the memory an
export may use, so a single transformers layer is made and takes the weights of each layer in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vz_edge.device.heap import give_back_freed_memory
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.decoder_spec import TOKEN_TABLE, decoder_config
from vz_edge.host.select.visionzip import cls_scores, mean_keys
from vz_edge.recipe import DecoderSpec, ModelSpec, TowerSpec


@torch.inference_mode()
def tower_states(
    checkpoint: Checkpoint, tower: TowerSpec, states_read: Sequence[int], pixel_values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the layers of a CLIP tower that hidden states ``states_read`` (as in ModelSpec) need, in float32.

    ``pixel_values`` is [tiles, 3, S, S]. Returns these states side by side [tiles, 1 + patches, n * width], and of the
    last of the layers the CLS scores [tiles, patches] and the keys averaged over heads [tiles, 1 + patches, head_dim].
    """
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings

    config = CLIPVisionConfig(
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=tower.heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        hidden_act=tower.activation,
        layer_norm_eps=tower.layer_norm_eps,
    )
    config._attn_implementation = "sdpa"
    embeddings = CLIPVisionEmbeddings(config)
    _load(embeddings, checkpoint, "vision_tower.embeddings.")
    norm = nn.LayerNorm(tower.hidden_size, eps=tower.layer_norm_eps)
    _load(norm, checkpoint, "vision_tower.pre_layrnorm.")
    hidden = norm(embeddings(pixel_values))
    layer = CLIPEncoderLayer(config).eval()
    projections: dict[str, torch.Tensor] = {}
    for name in ("q_proj", "k_proj"):
        module = getattr(layer.self_attn, name)
        module.register_forward_hook(lambda _module, _args, output, name=name: projections.update({name: output}))
    states = [hidden]
    for index in range(max(states_read)):
        _load(layer, checkpoint, f"vision_tower.encoder.layers.{index}.")
        states.append(_first(layer(states[-1], attention_mask=None)))
    queries, keys = projections["q_proj"], projections["k_proj"]
    hidden = torch.cat([states[index] for index in states_read], dim=-1)
    return hidden, cls_scores(queries[:, 0], keys, tower.heads), mean_keys(keys, tower.heads)


@torch.inference_mode()
def project(checkpoint: Checkpoint, model: ModelSpec, features: torch.Tensor) -> torch.Tensor:
    """The two-layer GELU projector in float32: [..., feature width] -> [..., hidden].

    Raises MissingTensorError and TensorShapeError.
    """
    hidden = model.decoder.hidden_size

    def linear(name: str, inputs: torch.Tensor, width: int) -> torch.Tensor:
        weight = checkpoint.weight(f"multi_modal_projector.{name}.weight", (hidden, width)).load()
        bias = (
            checkpoint.weight(f"multi_modal_projector.{name}.bias", (hidden,)).load() if model.projector_bias else None
        )
        return nn.functional.linear(inputs, weight.float(), None if bias is None else bias.float())

    return linear("linear_2", nn.functional.gelu(linear("linear_1", features, model.feature_width)), hidden)


@torch.inference_mode()
def decoder_states(
    checkpoint: Checkpoint,
    model: ModelSpec,
    embeds: torch.Tensor,
    layers: int,
    watch: Callable[[str, nn.Linear, torch.Tensor], None] = lambda *_: None,
) -> torch.Tensor:
    """Run the first ``layers`` decoder layers in float32 on ``embeds`` [1, n, hidden]; returns the residual stream.

    If these are all the layers, the final norm is applied. ``watch`` is called once for each linear layer, with its
    name in the checkpoint, the layer and what it reads, [1, n, in].

    Raises MissingTensorError and TensorShapeError.
    """
    decoder = one_layer_decoder(model.decoder)
    captured: dict[str, torch.Tensor] = {}
    decoder.layers[0].register_forward_hook(lambda _module, _args, output: captured.update(residual=_first(output)))
    index = 0
    for name, module in decoder.layers[0].named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda linear, args, name=name: watch(f"language_model.layers.{index}.{name}", linear, args[0])
            )
    _load(decoder.norm, checkpoint, "language_model.norm.")
    normed = embeds
    for index in range(layers):
        _load(decoder.layers[0], checkpoint, f"language_model.layers.{index}.")
        give_back_freed_memory()
        normed = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        embeds = captured["residual"]
        give_back_freed_memory()
    return normed if layers == model.decoder.layers else embeds


def token_embeds(checkpoint: Checkpoint, ids: Sequence[int]) -> torch.Tensor:
    """Rows [n, hidden] of the token table in float32."""
    rows = [checkpoint.load(TOKEN_TABLE, slice(token, token + 1)) for token in ids]
    return torch.cat(rows).float()


def one_layer_decoder(spec: DecoderSpec) -> Any:
    """A transformers decoder with one layer of the true width and next to no vocabulary, in float32."""
    from transformers import AutoModel

    config = decoder_config(spec, num_hidden_layers=1, vocab_size=8)
    return AutoModel.from_config(config, dtype=torch.float32).eval()


def _load(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(checkpoint.weight(prefix + name, tuple(parameter.shape)).load())


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
