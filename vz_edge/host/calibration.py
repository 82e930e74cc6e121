"""What the language model's linear layers are multiplied with: a picture and a text, read by torch.

The mean square of each input tells how much a weight's rounding error counts (``vz_edge.host.quant.weighted``). The
picture is the parity check's, the text ``calibration.txt``: text of the kind that a model is then measured on gives
weights no better (profiles/reports/weights_quality.md). One layer at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.decoder_spec import head_name
from vz_edge.host.reference import decoder_states, project, token_embeds
from vz_edge.planning.memory import decoder_linear_shapes
from vz_edge.recipe import DecoderSpec, ModelSpec

TEXT = Path(__file__).with_name("calibration.txt")
TEXT_TOKENS, PICTURE_TOKENS = 768, 128


def calibration_embeds(
    checkpoint: Checkpoint, model: ModelSpec, tokenizer: Tokenizer, patches: torch.Tensor
) -> torch.Tensor:
    """What is read, [1, n, hidden] in float32: the text, and a picture after its first token.

    ``patches`` [tiles, patches, width] are the tower's: at most PICTURE_TOKENS of them, evenly spaced, and not those
    that a budget keeps, so that a model's weights are the same with every budget. The text's first token is the
    tokenizer's start of a text where it has one, which trained models expect at the first place.
    """
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids
    rows = token_embeds(checkpoint, ids[:TEXT_TOKENS])
    patches = patches.flatten(0, 1)
    picture = project(checkpoint, model, patches[:: -(-len(patches) // PICTURE_TOKENS)])
    return torch.cat([rows[:1], picture, rows[1:]])[None]


def input_squares(
    checkpoint: Checkpoint, model: ModelSpec, embeds: torch.Tensor, progress: Callable[[str, int], None]
) -> dict[str, torch.Tensor]:
    """Mean squares [in] of the inputs of every linear layer and of the head, by the name of its weight.

    ``progress(name, bytes)`` is called for each layer, ``calibration_bytes`` in all. Raises MissingTensorError and
    TensorShapeError.
    """
    squares: dict[str, torch.Tensor] = {}

    def watch(name: str, linear: nn.Linear, inputs: torch.Tensor) -> None:
        squares[f"{name}.weight"] = mean_squares(inputs)
        progress(name, linear.weight.nbytes)

    normed = decoder_states(checkpoint, model, embeds, model.decoder.layers, watch)
    squares[head_name(model.decoder)] = mean_squares(normed)
    return squares


def calibration_bytes(decoder: DecoderSpec) -> int:
    """Bytes of float32 weights that ``input_squares`` goes through."""
    return 4 * sum(outputs * inputs for outputs, inputs in decoder_linear_shapes(decoder))


def mean_squares(inputs: torch.Tensor) -> torch.Tensor:
    """[..., in] -> [in]."""
    return inputs.flatten(0, -2).square().mean(0)
