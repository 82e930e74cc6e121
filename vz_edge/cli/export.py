"""``vz-edge export``: a checkpoint becomes a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from vz_edge.bundle import Manifest
    from vz_edge.host.export import ExportPlan

Bits = Literal["4", "8", "16"]


def command(
    model: Annotated[str, typer.Option(help="A recipe ('vz-edge models'), a local folder, or a hub id.")],
    bits: Annotated[Bits, typer.Option(help="Bits of the language model's weights; 16: not quantised.")] = "4",
    format_: Annotated[
        Literal["onnx", "bnb"],
        typer.Option(
            "--format",
            help="onnx: runs without torch; bnb: the language model as a transformers checkpoint with "
            "bitsandbytes weights.",
        ),
    ] = "onnx",
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Visual tokens at the model's largest tile count; several as 640,320,160, the default first; or "
            "'all'. Default: the recipe's."
        ),
    ] = None,
    dominant: Annotated[
        int | None, typer.Option(help="Dominant tokens a tile, CLS included; instead of --tokens.")
    ] = None,
    contextual: Annotated[int | None, typer.Option(help="Contextual tokens a tile; with --dominant.")] = None,
    target: Annotated[Literal["cpu", "cuda"], typer.Option(help="cpu: fp32 activations; cuda: fp16.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="The bundle's folder. Default: bundles/NAME.")] = None,
    lm_head_bits: Annotated[
        Bits | None, typer.Option(help="Bits of lm_head. Default: 8, or 16 with --bits 16 or --format bnb.")
    ] = None,
    vision_bits: Annotated[
        Literal["8", "16"] | None, typer.Option(help="Bits of the tower and projector. Default: 16.")
    ] = None,
    block_size: Annotated[
        Literal["32", "64", "128", "256"] | None, typer.Option(help="Weights that share a scale. Default: 128.")
    ] = None,
    quantizer: Annotated[
        Literal["rtn", "hqq", "weighted"] | None,
        typer.Option(
            help="weighted (default at 4 bits): rounded by what layers are multiplied with; rtn (default at 8): to "
            "nearest, several times faster; hqq: half-quadratic."
        ),
    ] = None,
    image_mode: Annotated[
        Literal["stock", "pad"] | None,
        typer.Option(help="stock: as transformers' processor; pad: LLaVA-1.5's published padding to a square."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that lies at --out.")] = False,
) -> None:
    """Export a checkpoint to a bundle that answers questions on a device without torch."""
    from vz_edge.cli.progress import ConsoleProgress, require_host

    require_host(format_)
    from vz_edge.host.export import ExportRequest, plan_export, write_bundle

    request = ExportRequest(
        model=model,
        out=out,
        format=format_,
        bits=int(bits),  # type: ignore[arg-type]
        tokens=tokens,
        dominant=dominant,
        contextual=contextual,
        target=target,
        lm_head_bits=lm_head_bits and int(lm_head_bits),  # type: ignore[arg-type]
        vision_bits=vision_bits and int(vision_bits),  # type: ignore[arg-type]
        block_size=block_size and int(block_size),
        quantizer=quantizer,
        image_mode=image_mode,
        force=force,
    )
    started = time.perf_counter()
    plan = plan_export(request)
    print(_announcement(plan))
    with ConsoleProgress() as progress:
        manifest = write_bundle(plan, progress)
    _print_summary(plan, manifest, time.perf_counter() - started)


def _announcement(plan: ExportPlan) -> str:
    predicted = plan.predicted
    splits = [f"{budget.dominant} dominant + {budget.contextual} contextual" for budget in plan.budgets]
    per_tile = f"{' or '.join(splits)} tokens a tile" if splits else "all tokens"
    return (
        f"{plan.source.name}: {plan.model.family} with a {plan.model.decoder.type} decoder, {per_tile}, "
        f"{plan.weights.bits}-bit weights{' of bitsandbytes' if plan.format == 'bnb' else ''} for {plan.target}\n"
        f"predicted: {predicted['disk_bytes'] / 1e9:.2f} GB on disk, peak memory of the export "
        f"{predicted['export_peak_rss_bytes'] / 1e9:.2f} GB; reading {plan.checkpoint.input_bytes / 1e9:.2f} GB"
    )


def _print_summary(plan: ExportPlan, manifest: Manifest, seconds: float) -> None:
    import resource

    from rich.console import Console
    from rich.table import Table

    from vz_edge.bundle import MANIFEST

    table = Table("file", "size", title=f"{plan.out}")
    for name, entry in manifest.files.items():
        table.add_row(name, _size(entry.size_bytes))
    total = sum(entry.size_bytes for entry in manifest.files.values())
    table.add_row("all", _size(total), style="bold")
    console = Console()
    console.print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = plan.checkpoint.input_bytes / seconds / 1e9
    console.print(f"{seconds:.1f} s ({rate:.2f} GB/s of input), peak memory {_size(peak)}; manifest: {MANIFEST}")
    vision, decoder = manifest.parity.vision, manifest.parity.decoder
    assert vision is not None and decoder is not None  # an export compares both
    kept = "" if vision.kept_agreement is None else f", {vision.kept_agreement:.1%} of the kept positions"
    console.print(
        f"against torch: vision features within {vision.max_error:.1e} of the largest{kept}; "
        f"decoder ({decoder.layers} of {manifest.model.decoder.layers} layers) with a relative error of "
        f"{decoder.relative_error:.1e}"
    )
    console.print(f"ask it: vz-edge run {plan.out} --image PICTURE 'a question'")


def _size(size_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes} B"
