"""The export: a checkpoint becomes a bundle, in ordered stages.

``plan_export`` resolves everything and predicts sizes without reading a weight, so that what is impossible
fails in a second; ``write_bundle`` then streams the weights, checks the result against torch and seals the
folder.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import onnx_ir as ir
import torch
from tokenizers import Tokenizer

from vz_edge import __version__
from vz_edge.backends.transformers_backend import require_kernel, require_packages
from vz_edge.budget import TokenBudget, check_budget, parse_budgets
from vz_edge.bundle import (
    FORMAT_VERSION,
    LANGUAGE_MODEL,
    ImageSpec,
    Manifest,
    StopSpec,
    WeightSpec,
    bitsandbytes_weights,
    default_weights,
    write_manifest,
)
from vz_edge.errors import BudgetError, DiskSpaceError, ExportError
from vz_edge.host.calibration import calibration_bytes, calibration_embeds, input_squares
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.decoder_graph import DecoderQuant, build_decoder
from vz_edge.host.embedding_graph import write_embedding, write_table
from vz_edge.host.families import unknown_fields
from vz_edge.host.fields import check_fields
from vz_edge.host.genai_config import genai_config
from vz_edge.host.graph import GraphBuilder
from vz_edge.host.opened import open_model
from vz_edge.host.original_llava import is_original
from vz_edge.host.parity import check_parity
from vz_edge.host.parity_picture import Look, look
from vz_edge.host.preprocessing import Settings, image_spec, read_settings, settings_to_write
from vz_edge.host.quant import quant_config
from vz_edge.host.source import Source, check_recipe, matching_recipe, resolve
from vz_edge.host.text_files import check_text_files, stop_spec, write_chat_template, write_tokenizer
from vz_edge.host.vision_graph import build_vision
from vz_edge.planning.memory import bundle_bytes, export_peak_rss_bytes, kv_cache_bytes_per_token
from vz_edge.recipe import ModelSpec, PromptSpec
from vz_edge.staging import check_target, staged_folder

PRECISION = {"cpu": ir.DataType.FLOAT, "cuda": ir.DataType.FLOAT16}
DISK_MARGIN = 1.02
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportRequest:
    """What a user asks for; None means the recipe's or the tool's default.

    ``tokens`` is the total at the model's largest tile count, several of them ("640,320,160", the default first), or
    "all" for the vanilla model;
    ``dominant`` and ``contextual`` are counts a tile and exclude ``tokens``.
    """

    model: str
    out: Path | None = None
    format: Literal["onnx", "bnb"] = "onnx"
    bits: Literal[4, 8, 16] = 4
    tokens: str | None = None
    dominant: int | None = None
    contextual: int | None = None
    target: Literal["cpu", "cuda"] = "cpu"
    lm_head_bits: Literal[4, 8, 16] | None = None
    vision_bits: Literal[8, 16] | None = None
    block_size: int | None = None
    quantizer: Literal["rtn", "hqq", "weighted"] | None = None
    image_mode: Literal["stock", "pad"] | None = None
    force: bool = False


@dataclass(frozen=True)
class ExportPlan:
    """All that was resolved before a weight is read."""

    source: Source
    checkpoint: Checkpoint
    model: ModelSpec
    format: Literal["onnx", "bnb"]
    budgets: tuple[TokenBudget, ...]  # none: all tokens
    weights: WeightSpec
    target: Literal["cpu", "cuda"]
    image: ImageSpec
    preprocessing: Settings
    prompt: PromptSpec | None
    out: Path
    force: bool
    predicted: dict[str, int]


class Progress(Protocol):
    """Where an export reports to: stages, and bytes done in each."""

    def start(self, stage: str, total_bytes: int) -> None:
        """A stage begins; ``total_bytes`` is 0 where it has no size."""

    def advance(self, item: str, size_bytes: int) -> None:
        """``size_bytes`` more of the stage are done; ``item`` names the tensor or file."""


class SilentProgress:
    """A Progress that says nothing, for those who export from Python."""

    def start(self, stage: str, total_bytes: int) -> None:
        """Say nothing."""

    def advance(self, item: str, size_bytes: int) -> None:
        """Say nothing."""


def plan_export(request: ExportRequest) -> ExportPlan:
    """Resolve a request. Raises every error that can be known before the weights are read."""
    source = resolve(request.model)
    checkpoint, model = open_model(source.folder)
    check_recipe(source, model)
    recipe = source.recipe or matching_recipe(model)
    preprocessing = read_settings(source.folder, checkpoint.config)
    mode = recipe.image_mode if recipe else "stock"
    image = image_spec(preprocessing, checkpoint.config, model, request.image_mode, mode)
    _name_unknown_fields(checkpoint, preprocessing)
    weights = resolve_weights(request)
    if request.format == "bnb":
        _check_bitsandbytes(model, weights.bits)
    parts = bundle_bytes(model, weights, request.target)
    plan = ExportPlan(
        source=source,
        checkpoint=checkpoint,
        model=model,
        format=request.format,
        budgets=resolve_budgets(request, model, source.recipe.tokens if source.recipe else None),
        weights=weights,
        target=request.target,
        image=image,
        preprocessing=preprocessing,
        prompt=recipe.prompt if recipe else None,
        out=request.out or Path("bundles") / source.name,
        force=request.force,
        predicted={
            **{f"{part}_bytes": size for part, size in parts.items()},
            "disk_bytes": sum(parts.values()),
            "export_peak_rss_bytes": export_peak_rss_bytes(model),
            # torch holds the cache in 16 bits on the CPU too.
            "kv_cache_bytes_per_token": kv_cache_bytes_per_token(
                model.decoder, "cuda" if request.format == "bnb" else request.target
            ),
        },
    )
    check_target(plan.out, plan.force, source.folder)
    _check_disk(plan.out, plan.predicted["disk_bytes"])
    return plan


def resolve_weights(request: ExportRequest) -> WeightSpec:
    """Bits and blocks. Raises ExportError for what bitsandbytes does not do."""
    chosen = {name: getattr(request, name) for name in ("lm_head_bits", "vision_bits", "block_size", "quantizer")}
    given = {name: value for name, value in chosen.items() if value is not None}
    if request.format == "onnx":
        return dataclasses.replace(default_weights(request.bits), **given)
    weights = bitsandbytes_weights(request.bits)
    for name, value in given.items():
        if value != getattr(weights, name):
            raise ExportError(
                f"--{name.replace('_', '-')} {value} does not apply to --format bnb, whose blocks and rounding are "
                "bitsandbytes' own and which leaves lm_head, tower and projector at 16 bits; leave it out, or take "
                "--format onnx"
            )
    return weights


def resolve_budgets(request: ExportRequest, model: ModelSpec, default: int | None) -> tuple[TokenBudget, ...]:
    """The budgets a tile, none for all tokens. Raises BudgetError."""
    patches = model.tower.patches
    if request.dominant is not None or request.contextual is not None:
        if request.tokens is not None:
            raise BudgetError(
                "--tokens is a total and --dominant/--contextual are counts a tile; give one or the other"
            )
        if request.dominant is None or request.contextual is None:
            raise BudgetError("--dominant and --contextual go together; for one number use --tokens")
        return (check_budget(TokenBudget(request.dominant, request.contextual), patches),)
    return parse_budgets(request.tokens or str(default or model.default_tokens), model.max_tiles, patches)


def write_bundle(plan: ExportPlan, progress: Progress) -> Manifest:
    """Write the planned bundle to ``plan.out``; on any failure nothing is left there."""
    with staged_folder(plan.out, plan.force, plan.source.folder) as staging:
        checkpoint, model, folder, image = plan.checkpoint, plan.model, plan.source.folder, plan.image
        write_tokenizer(folder, staging, model, is_original(checkpoint.config))
        write_chat_template(folder, staging, plan.prompt)
        settings = json.dumps(settings_to_write(plan.preprocessing), indent=2)
        (staging / "preprocessor_config.json").write_text(settings + "\n", encoding="utf-8")
        stop = stop_spec(folder, checkpoint.config, staging / "tokenizer.json", plan.prompt)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            created_by=f"vz-edge {__version__}",
            name=plan.source.name,
            checkpoint=plan.source.checkpoint,
            model=model,
            format=plan.format,
            target=plan.target,
            budget=plan.budgets[0] if plan.budgets else None,
            more_budgets=plan.budgets[1:],
            weights=plan.weights,
            image=image,
            stop=stop,
            predicted=plan.predicted,
        )
        progress.start("reference picture", 0)
        expected = look(checkpoint, model, image, plan.budgets)
        vision_quant = quant_config(plan.weights.vision_bits, plan.weights)
        vision = build_vision(checkpoint, model, plan.budgets, PRECISION[plan.target], vision_quant)
        _save("vision", vision, staging, progress)
        if plan.format == "bnb":
            _write_bitsandbytes(plan, stop, staging, progress)
        else:
            _write_onnx(plan, expected, stop, staging, progress)
        progress.start("parity with torch", 0)
        manifest = dataclasses.replace(manifest, parity=check_parity(staging, manifest, checkpoint, expected))
        progress.start("hashes", sum(path.stat().st_size for path in staging.rglob("*") if path.is_file()))
        return write_manifest(staging, manifest, progress.advance)


def _write_onnx(plan: ExportPlan, seen: Look, stop: StopSpec, staging: Path, progress: Progress) -> None:
    """Token table and decoder as graphs, and what ONNX Runtime GenAI needs beside them."""
    checkpoint, model, precision = plan.checkpoint, plan.model, PRECISION[plan.target]
    progress.start("embedding", plan.predicted["embedding_bytes"])
    write_embedding(checkpoint, model, precision, staging, progress.advance)
    linear, lm_head = (quant_config(bits, plan.weights) for bits in (plan.weights.bits, plan.weights.lm_head_bits))
    calibrated = plan.weights.quantizer == "weighted" and (linear or lm_head)
    squares = _calibrate(plan, seen, staging, progress) if calibrated else {}
    decoder = build_decoder(checkpoint, model.decoder, precision, DecoderQuant(linear, lm_head, squares))
    _save("decoder", decoder, staging, progress)
    config = genai_config(model, stop.token_ids, plan.target)
    (staging / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _calibrate(plan: ExportPlan, seen: Look, staging: Path, progress: Progress) -> dict[str, torch.Tensor]:
    """What the decoder's layers are multiplied with, for the quantiser that asks."""
    progress.start("calibration", calibration_bytes(plan.model.decoder))
    tokenizer = Tokenizer.from_file(str(staging / "tokenizer.json"))
    embeds = calibration_embeds(plan.checkpoint, plan.model, tokenizer, seen.patches)
    return input_squares(plan.checkpoint, plan.model, embeds, progress.advance)


def _write_bitsandbytes(plan: ExportPlan, stop: StopSpec, staging: Path, progress: Progress) -> None:
    """Token table, and the decoder as a transformers checkpoint."""
    from vz_edge.host.bnb import write_language_model

    progress.start("embedding", plan.predicted["embedding_bytes"])
    write_table(plan.checkpoint, plan.model, staging, progress.advance)
    progress.start("language model", plan.predicted["decoder_bytes"] + plan.predicted["lm_head_bytes"])
    bits: Literal[4, 8] = plan.weights.bits  # type: ignore[assignment]
    folder, decoder = staging / LANGUAGE_MODEL, plan.model.decoder
    write_language_model(plan.checkpoint, decoder, bits, plan.target, stop.token_ids, folder, progress.advance)


def _check_bitsandbytes(model: ModelSpec, bits: Literal[4, 8, 16]) -> None:
    """Raise DependencyError, ProviderError or UnsupportedModelError where bitsandbytes cannot do it here."""
    require_packages("exporting with --format bnb")
    require_kernel(bits, "cpu")
    from vz_edge.host.bnb import check_shapes

    check_shapes(model.decoder, bits)


def _name_unknown_fields(checkpoint: Checkpoint, preprocessing: Settings) -> None:
    """Say which fields nobody here knows.

    Raises UnsupportedModelError and CheckpointError for what is known and refused.
    """
    unknown = [
        *unknown_fields(checkpoint.config),
        *check_fields("image_processor", preprocessing.values, preprocessing.where),
        *check_text_files(checkpoint.folder),
    ]
    if unknown:
        logger.warning("fields that the export does not know, and that have no effect: %s", "; ".join(unknown))


def _save(name: str, graph: GraphBuilder, staging: Path, progress: Progress) -> None:
    progress.start(name, graph.weight_bytes())
    graph.save(staging / f"{name}.onnx", _named(name, progress.advance))


def _named(stage: str, advance: Callable[[str, int], None]) -> Callable[[str, int], None]:
    return lambda tensor, size_bytes: advance(f"{stage}: {tensor}", size_bytes)


def _check_disk(out: Path, needed_bytes: int) -> None:
    existing = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    disk = shutil.disk_usage(existing)
    required_bytes = needed_bytes * DISK_MARGIN
    # A file system without a size (/proc, /sys, some networks') does not tell what is free; writing to it will.
    if disk.total and disk.free < required_bytes:
        raise DiskSpaceError(
            f"{out} needs {required_bytes / 1e6:,.1f} MB and {existing} has {disk.free / 1e6:,.1f} MB free; free some "
            "space or choose another --out"
        )
