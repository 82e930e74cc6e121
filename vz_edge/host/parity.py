"""The check that ends an export: a picture through the bundle's files and through torch, differences recorded.

Torch is transformers' own layers on the checkpoint's weights (``reference.py``); the bundle's side is the
files just written, graphs a slice at a time (``segments.py``), so the check keeps the export's memory bound. The
vision graph is compared whole. Of a decoder too large for that the first layers are compared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from vz_edge.backends.transformers_backend import load_language_model
from vz_edge.bundle import LANGUAGE_MODEL, BudgetParity, DecoderParity, Manifest, Parity, VisionParity
from vz_edge.device.image import Tiles, vanilla_token_order
from vz_edge.device.verify import PARITY_PROMPT, feature_sample, kept_agreement
from vz_edge.errors import ExportError
from vz_edge.host import reference
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.decoder_spec import head_name
from vz_edge.host.head_padding import HeadPadding
from vz_edge.host.parity_picture import Features, Look
from vz_edge.host.segments import run_in_segments
from vz_edge.planning.memory import decoder_linear_shapes

WHOLE_DECODER_ELEMENTS = 200_000_000  # up to here the whole decoder is compared, beyond it the first layers
FIRST_LAYERS = 2
MOST_IMAGE_TOKENS = 320
# Rounding to 8 bits moves a few kept positions, fp16 fewer; a graph that keeps other ones is broken.
LEAST_KEPT_AGREEMENT = 0.5
# Beyond these the bundle does not do what the checkpoint does: a bug, not rounding.
LARGEST_VISION_ERROR = {8: 0.5, 16: 0.02}
LARGEST_DECODER_ERROR = {4: 0.8, 8: 0.2, 16: 0.02}


def check_parity(folder: Path, manifest: Manifest, checkpoint: Checkpoint, expected: Look) -> Parity:
    """Compare with what torch saw, and return what goes into the manifest (docs/bundle.md).

    Raises ExportError if they disagree.
    """
    vision, *others = (
        _compare_vision(folder, manifest, expected.tiles, index, features)
        for index, features in enumerate(expected.by_budget)
    )
    return Parity(
        vision,
        tuple(BudgetParity(other.tokens, other.max_error, other.kept_agreement) for other in others),
        _compare_decoder(folder, manifest, checkpoint, expected.by_budget[0].tokens),
    )


def _compare_vision(folder: Path, manifest: Manifest, tiles: Tiles, index: int, expected: Features) -> VisionParity:
    """Compare the vision graph with its budget of number ``index``."""
    feeds: dict[str, np.ndarray] = {"pixel_values": tiles.pixel_values}
    if manifest.more_budgets:
        feeds["budget"] = np.array([index])
    outputs = ["image_features"]
    if expected.kept is not None:
        outputs.append("kept")
    if tiles.grid is not None and manifest.budget is not None:
        feeds["grid_width"] = np.array([tiles.grid[0]], dtype=np.int64)
    elif tiles.grid is not None:
        feeds["token_order"] = vanilla_token_order(
            tiles.original_size, tiles.grid, manifest.model.tower.patches_per_side
        )
    features, *kept = run_in_segments(folder / "vision.onnx", feeds, outputs)
    reference_features = expected.tokens.numpy()
    agreement = None if expected.kept is None else kept_agreement(kept[0], expected.kept.numpy())
    error = float(np.abs(features.astype(np.float32) - reference_features).max() / np.abs(reference_features).max())
    if features.shape != reference_features.shape or not np.isfinite(error):
        raise ExportError(
            f"vision.onnx gave features {features.shape}, torch {tuple(reference_features.shape)}: not exported"
        )
    if agreement is not None and agreement < LEAST_KEPT_AGREEMENT:
        raise ExportError(
            f"vision.onnx keeps {agreement:.0%} of the positions that torch keeps: not exported; report this"
        )
    # A different kept position moves whole rows, so the bound on features holds where the positions agree.
    if agreement in (None, 1.0) and error > LARGEST_VISION_ERROR[manifest.weights.vision_bits]:
        raise ExportError(
            f"vision.onnx differs from torch by {error:.1e} of the largest feature: not exported; report this"
        )
    return VisionParity(
        tiles=len(tiles.pixel_values),
        tokens=len(features),
        max_error=error,
        kept_agreement=agreement,
        kept=None if not kept else tuple(tuple(row) for row in kept[0].tolist()),
        feature_sample=feature_sample(features),
    )


def _compare_decoder(folder: Path, manifest: Manifest, checkpoint: Checkpoint, features: torch.Tensor) -> DecoderParity:
    model = manifest.model
    prompt = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PARITY_PROMPT).ids
    embeds = torch.cat([features[:MOST_IMAGE_TOKENS], reference.token_embeds(checkpoint, prompt)])[None]
    elements = sum(outputs * inputs for outputs, inputs in decoder_linear_shapes(model.decoder))
    whole = elements <= WHOLE_DECODER_ELEMENTS
    layers = model.decoder.layers if whole else min(FIRST_LAYERS, model.decoder.layers)
    expected = reference.decoder_states(checkpoint, model, embeds, layers)
    complete = layers == model.decoder.layers
    if complete:
        expected = expected[:, -1:] @ checkpoint.load(head_name(model.decoder)).float().T
    run = _transformers_states if manifest.format == "bnb" else _graph_states
    found = run(folder, manifest, embeds, layers, complete)
    error = float(np.linalg.norm(found.astype(np.float32) - expected.numpy()) / np.linalg.norm(expected.numpy()))
    if not error <= LARGEST_DECODER_ERROR[manifest.weights.bits]:
        raise ExportError(
            f"the decoder differs from torch by {error:.1e} after {layers} layers: not exported; report this"
        )
    return DecoderParity(
        layers=layers,
        output="logits" if complete else "residual",
        relative_error=error,
        top_token=int(found[0, -1].argmax()) if complete else None,
    )


def _graph_states(folder: Path, manifest: Manifest, embeds: torch.Tensor, layers: int, complete: bool) -> np.ndarray:
    """What decoder.onnx gives: logits if ``complete``, else the residual stream after the first ``layers`` layers."""
    output = "logits" if complete else f"language_model.layers.{layers}.input_layernorm/output_3"  # the residual sum
    return run_in_segments(folder / "decoder.onnx", _decoder_feeds(manifest, embeds.numpy()), [output])[0]


@torch.inference_mode()
def _transformers_states(
    folder: Path, manifest: Manifest, embeds: torch.Tensor, layers: int, complete: bool
) -> np.ndarray:
    """The same of a checkpoint with bitsandbytes weights, loaded as EdgeModel loads it and run on the CPU."""
    model = load_language_model(folder / LANGUAGE_MODEL, "cpu", layers)
    captured: dict[str, torch.Tensor] = {}
    model.model.layers[-1].register_forward_hook(
        lambda _module, _args, output: captured.update(residual=output[0] if isinstance(output, tuple) else output)
    )
    logits = model(inputs_embeds=embeds.to(model.dtype), use_cache=False, logits_to_keep=1).logits
    found: np.ndarray = (logits if complete else captured["residual"]).float().numpy()
    return found


def _decoder_feeds(manifest: Manifest, embeds: np.ndarray) -> dict[str, np.ndarray]:
    decoder = manifest.model.decoder
    dtype = np.float32 if manifest.target == "cpu" else np.float16
    empty = np.zeros((1, decoder.kv_heads, 0, HeadPadding.of(decoder).stored), dtype=dtype)
    past = {f"past_key_values.{i}.{part}": empty for i in range(decoder.layers) for part in ("key", "value")}
    mask = np.ones((1, embeds.shape[1]), dtype=np.int64)
    return {"inputs_embeds": embeds.astype(dtype), "attention_mask": mask, **past}
