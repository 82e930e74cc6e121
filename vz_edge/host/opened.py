"""A checkpoint's folder opened: its tensors by name, and the model that its config describes.

What cannot be exported is refused here, in the order in which a user can understand it: an adapter or quantised weights
before a family that is not there, a family before a tower that was not found, and all of it before a weight is read.

>>> opened = open_model(folder)
>>> opened.model.decoder.layers
32
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.config_file import read_config
from vz_edge.host.decoder_spec import TOKEN_TABLE
from vz_edge.host.families import spec_from_config
from vz_edge.host.original_llava import is_original
from vz_edge.host.source import resolve_tower, tower_config
from vz_edge.recipe import ModelSpec

HEAD = "lm_head.weight"
TOWER_WEIGHT = "vision_tower.embeddings.patch_embedding.weight"
ROWS_AT_ONCE = 2048


class Opened(NamedTuple):
    """``model`` is what transformers would make of ``checkpoint``."""

    checkpoint: Checkpoint
    model: ModelSpec


def open_model(folder: Path) -> Opened:
    """Open a checkpoint and, of the original LLaVA code, the tower that may lie elsewhere.

    Raises CheckpointError, MissingTensorError, UnsafeCheckpointError and UnsupportedModelError.
    """
    config = read_config(folder)
    checkpoint = Checkpoint.open(folder)
    if not checkpoint.has(TOWER_WEIGHT):
        checkpoint = Checkpoint.open(folder, tower=resolve_tower(config, folder))
    elif is_original(config):
        checkpoint = dataclasses.replace(checkpoint, tower_config=tower_config(config, folder))
    model = spec_from_config(checkpoint.config, checkpoint.tower_config)
    return Opened(checkpoint, _with_own_head(model, checkpoint))


def read_model(folder: Path) -> ModelSpec:
    """The model that a checkpoint's config describes, for a plan: its weights need not be there, and are not looked at.

    Raises as ``open_model``.
    """
    config = read_config(folder)
    return spec_from_config(config, tower_config(config, folder) if is_original(config) else None)


def _with_own_head(model: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """``model`` untied where the checkpoint has an lm_head that is not its token table.

    transformers 5 then uses that head, whatever the config says (PreTrainedModel.tie_weights).
    """
    if not model.decoder.tie_word_embeddings or not checkpoint.has(HEAD) or not checkpoint.has(TOKEN_TABLE):
        return model
    if _are_equal(checkpoint, HEAD, TOKEN_TABLE):
        return model
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, tie_word_embeddings=False))


def _are_equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    rows = checkpoint.shape(one)[0]
    if checkpoint.shape(one) != checkpoint.shape(other):
        return False
    pieces = (slice(start, start + ROWS_AT_ONCE) for start in range(0, rows, ROWS_AT_ONCE))
    return all(torch.equal(checkpoint.load(one, piece), checkpoint.load(other, piece)) for piece in pieces)
