"""The checkpoints and bundles that several benchmarks share: made when missing, kept for the next one.

Random weights are rounded to nearest (NEAREST): the export's default, calibration and a search for better grids, takes
longer and gives a bundle of the same size and speed. Where the export itself is measured (``export_memory``), it is the
default, and whoever finds that bundle takes it.

torch is loaded where a graph is made and not before: some benchmarks measure the memory of their own process.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from benchmarks.make_checkpoint import Part, make_checkpoint, model_of_shape
from benchmarks.processes import run_measured
from vz_edge.bundle import MANIFEST, Parity, read_manifest, write_manifest
from vz_edge.staging import staged_folder

WORK = Path("build/benchmarks")
DEMO = "vz-demo"
NEAREST = ("--quantizer", "rtn")
CHUNK_BYTES = 1 << 24
Target = Literal["cpu", "cuda"]


def checkpoint_folder(shape: str, work: Path, part: Part = "all") -> Path:
    """The random checkpoint of that shape."""
    folder = work / (shape if part == "all" else f"{shape}-{part}")
    make_checkpoint(model_of_shape(shape), folder, part)
    return folder


def bundle_folder(shape: str, target: Target, work: Path) -> Path:
    """Where the benchmark's bundle of that shape lies, or will."""
    return work / f"{shape}-{target}-bundle"


def export_command(model: str, target: Target, out: Path, *options: str) -> list[str]:
    """An export of 4 bits and 320 tokens through the command line, with these further options."""
    always = ["--bits", "4", "--tokens", "320", "--target", target, "--out", str(out), "--force"]
    return [sys.executable, "-m", "vz_edge", "export", "--model", model, *always, *options]


def bundle(shape: str, target: Target, work: Path) -> Path:
    """The bundle of that shape, exported now, rounded to nearest, if it is not there."""
    folder = bundle_folder(shape, target, work)
    if not (folder / MANIFEST).exists():
        checkpoint = checkpoint_folder(shape, work)
        command = export_command(str(checkpoint), target, folder, *NEAREST)
        run_measured(command, work / "logs" / f"{folder.name}.log")
    return folder


def demo_bundle(work: Path) -> Path:
    """The embedded model's bundle for the CPU at 4 bits and 320 tokens, exported now if it is not there."""
    folder = bundle_folder(DEMO, "cpu", work)
    if not (folder / MANIFEST).exists():
        run_measured(export_command(DEMO, "cpu", folder), work / "logs" / f"{folder.name}.log")
    return folder


def bundle_with_tokens(shape: str, target: Target, work: Path, tokens: str) -> Path:
    """The same bundle with another token budget: a vision graph of its own, every other file linked to ``bundle``'s."""
    folder = work / f"{shape}-{target}-{tokens}"
    if (folder / MANIFEST).exists():
        return folder
    from vz_edge.host.export import PRECISION, ExportRequest, plan_export
    from vz_edge.host.vision_graph import build_vision

    base = bundle(shape, target, work)
    plan = plan_export(ExportRequest(str(work / shape), folder, bits=4, tokens=tokens, target=target))
    manifest = dataclasses.replace(
        read_manifest(base), budget=plan.budgets[0] if plan.budgets else None, parity=Parity()
    )
    with staged_folder(folder, force=False) as staging:
        vision = build_vision(plan.checkpoint, plan.model, plan.budgets, PRECISION[target], None)
        vision.save(staging / "vision.onnx", lambda *_: None)
        for name in manifest.files:
            if not name.startswith("vision."):
                os.link(base / name, staging / name)
        write_manifest(staging, manifest, lambda *_: None)
    return folder


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def shards(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that hold its weights."""
    return sorted(checkpoint.glob("*.safetensors"))


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """Make the next reader of these files read from the disk. Needs no privilege, and no other file is touched."""
    os.sync()  # a page that is not on disk yet would stay
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bring_into_page_cache(files: Iterable[Path]) -> None:
    """Make the next reader of these files find them in memory, with nothing left to be written behind its back."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            while file.read(CHUNK_BYTES):
                pass
