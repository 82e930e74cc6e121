"""Speed of the vision part on the CPU: CLIP ViT-L/14-336, VisionZip at 64 tokens a tile, LLaVA-13B's projector.

    python -m benchmarks.vision_speed                      # one tile and five tiles

Six rivals with the same random weights and pictures, each in a process of its own, in interleaved rounds:

* vision.onnx as it is exported for 64 tokens a tile (fp32)
* the same where memory is short: given back after each picture (``release_memory=True``)
* the first with 8-bit linear layers (``--vision-bits 8``)
* vision.onnx without selection (``--tokens all``): every patch through the projector
* torch, the published way: eager attention in all 24 layers, attention matrices kept, selection, projector
* torch with fused attention, one CLS row, 23 layers (see published_vision.py)

The graphs run as a bundle's do, in the device side's VisionEncoder: with memory to spare (``release_memory=False``),
as torch does, so that weights are repacked and the activations' memory is kept; but for the second, whose float weights
stay mapped and which gives back their pages and the activations' memory after each picture, in the time that is
measured. What each process has of memory after a picture is in the report, and shows that it did so. All rivals have
the same number of threads.

One tile is LLaVA-1.5; five tiles are LLaVA-NeXT's base tile and 2 x 2 grid. The report also says how far the
features are from the published way's, and what 8 bits change in the positions that are kept (random weights:
the demo model's report has the figures of a trained tower).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import bundles
from benchmarks.make_checkpoint import model_of_shape
from benchmarks.report import GB, REPORTS, Bar, Cell, Report, Samples
from vz_edge.budget import TokenBudget
from vz_edge.bundle import FORMAT_VERSION, ImageSpec, Manifest, StopSpec, default_weights
from vz_edge.device.image import Tiles
from vz_edge.device.runtime import CPU
from vz_edge.device.vision import VisionEncoder
from vz_edge.profiling.environment import busy_percent
from vz_edge.profiling.process_memory import memory_bytes
from vz_edge.profiling.processes import interleave, serve, workers
from vz_edge.recipe import ModelSpec
from vz_edge.staging import staged_folder

OURS, RELEASED = "vision.onnx, 64 tokens a tile", "the same, memory given back"
OURS_8_BIT, ALL = "the first, --vision-bits 8", "vision.onnx, --tokens all"
PUBLISHED, SDPA = "torch, published way", "torch, fused attention"
RIVALS = {
    "ours": OURS,
    "released": RELEASED,
    "ours-8-bit": OURS_8_BIT,
    "all": ALL,
    "published": PUBLISHED,
    "sdpa": SDPA,
}
BUDGET = TokenBudget(54, 10)
GRID_WIDTH = 2
ROUNDS = {1: 15, 5: 3}  # one tile is short, and noisy
LEAST_SPEEDUP = 1.45


def model_for(shape: str, tiles: int) -> ModelSpec:
    """LLaVA-1.5 for one tile, LLaVA-NeXT for more."""
    model = model_of_shape(shape)
    return model if tiles > 1 else dataclasses.replace(model, family="llava", grid_pinpoints=())


def pictures(tiles: int, side: int) -> np.ndarray:
    """Random normalised pixels [tiles, 3, side, side], float32."""
    return np.random.default_rng(0).standard_normal((tiles, 3, side, side), dtype=np.float32)


def prepare(rival: str, shape: str, tiles: int, threads: int, work: Path) -> Callable[[dict], dict]:
    """Load a rival; the returned function runs it once and may save what came out."""
    checkpoint = bundles.checkpoint_folder(shape, work, "vision")
    model = model_for(shape, tiles)
    pixel_values = pictures(tiles, model.tower.image_size)
    make = _torch_runner if rival in ("published", "sdpa") else _onnx_runner
    run = make(rival, checkpoint, model, pixel_values, threads, work)

    def measure(request: dict) -> dict:
        start = time.perf_counter()
        outputs = run()
        sec = time.perf_counter() - start
        resident_bytes = memory_bytes()["VmRSS"]
        if "save" in request:
            np.savez(request["save"], **outputs)
        return {"sec": sec, "resident_bytes": resident_bytes}

    return measure


def _onnx_runner(
    rival: str, checkpoint: Path, model: ModelSpec, pixel_values: np.ndarray, threads: int, work: Path
) -> Callable[[], dict[str, np.ndarray]]:
    graph = "ours" if rival == "released" else rival
    folder = work / f"vision-{checkpoint.name}-{model.family}-{graph}"
    if not folder.exists():
        _export(graph, checkpoint, model, folder)
    release = rival == "released"
    encoder = VisionEncoder.open(folder, _manifest(graph, model), [CPU], threads, release_memory=release)
    side = GRID_WIDTH * model.tower.image_size
    tiles = Tiles(pixel_values, (GRID_WIDTH, GRID_WIDTH) if len(pixel_values) > 1 else None, (side, side))

    def run() -> dict[str, np.ndarray]:
        found = encoder.encode(tiles)
        kept = {} if found.kept is None else {"kept": found.kept}
        return {"image_features": found.features, **kept}

    return run


def _in_the_graph(rival: str, model: ModelSpec) -> ModelSpec:
    """Without selection the order of a grid's tokens is computed outside of the graph: one family serves all."""
    return dataclasses.replace(model, family="llava", grid_pinpoints=()) if rival == "all" else model


def _manifest(rival: str, model: ModelSpec) -> Manifest:
    """What a bundle would say of that vision graph."""
    return Manifest(
        format_version=FORMAT_VERSION,
        created_by="benchmarks.vision_speed",
        name=rival,
        checkpoint="random",
        model=_in_the_graph(rival, model),
        target="cpu",
        budget=None if rival == "all" else BUDGET,
        weights=dataclasses.replace(default_weights(4), vision_bits=8 if rival == "ours-8-bit" else 16),
        image=ImageSpec("stock", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),  # the pixels are normalised
        stop=StopSpec((), ()),
    )


def _export(rival: str, checkpoint: Path, model: ModelSpec, folder: Path) -> None:
    import onnx_ir as ir

    from vz_edge.host.checkpoint import Checkpoint
    from vz_edge.host.quant import QuantConfig
    from vz_edge.host.vision_graph import build_vision

    budget = None if rival == "all" else BUDGET
    quant = QuantConfig(bits=8) if rival == "ours-8-bit" else None
    budgets = () if budget is None else (budget,)
    graph = build_vision(Checkpoint.open(checkpoint), _in_the_graph(rival, model), budgets, ir.DataType.FLOAT, quant)
    with staged_folder(folder, force=False) as staging:
        graph.save(staging / "vision.onnx", lambda *_: None)


def _torch_runner(
    rival: str, folder: Path, model: ModelSpec, pixel_values: np.ndarray, threads: int, work: Path
) -> Callable[[], dict[str, np.ndarray]]:
    import torch

    from benchmarks import published_vision
    from vz_edge.host.checkpoint import Checkpoint

    torch.set_num_threads(threads)
    features = getattr(published_vision, rival)(Checkpoint.open(folder), model, BUDGET)
    pixels = torch.from_numpy(pixel_values)

    def run() -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {"image_features": features(pixels, GRID_WIDTH).numpy()}

    return run


def measure(
    shape: str, tiles: int, threads: int, work: Path, rounds: int
) -> tuple[dict[str, Samples], dict[str, Samples], dict, dict]:
    """Seconds and memory of each rival, largest difference from the published features, and what 8 bits change."""
    base = [sys.executable, "-m", "benchmarks.vision_speed", "--shape", shape, "--work", str(work)]
    options = ["--threads", str(threads), "--tiles", str(tiles)]
    commands = {name: [*base, *options, "--worker", rival] for rival, name in RIVALS.items()}
    saved = {}
    with workers(commands, threads) as rivals:
        answers = interleave(rivals, {}, rounds)
        for rival, name in RIVALS.items():
            path = work / f"features-{rival}.npz"
            rivals[name].ask({"save": str(path)})
            saved[name] = dict(np.load(path))
            path.unlink()
    seconds = {name: Samples(tuple(answer["sec"] for answer in given), "s") for name, given in answers.items()}
    resident = {
        name: Samples(tuple(answer["resident_bytes"] / GB for answer in given), "GB") for name, given in answers.items()
    }
    return seconds, resident, _differences(saved), _change(saved[OURS], saved[OURS_8_BIT], tiles)


def _differences(saved: dict[str, dict[str, np.ndarray]]) -> dict[str, float]:
    """Largest difference from the published features, as a share of their largest value."""
    reference = saved[PUBLISHED]["image_features"]
    largest = abs(reference).max()
    return {
        name: float(abs(saved[name]["image_features"] - reference).max() / largest) for name in (OURS, RELEASED, SDPA)
    }


def _change(exact: dict[str, np.ndarray], coarse: dict[str, np.ndarray], tiles: int) -> dict[str, float]:
    """Share of kept positions that 8 bits keep too; for one tile, error of the features at those positions."""
    shared = [np.isin(a, b) for a, b in zip(exact["kept"], coarse["kept"], strict=True)]
    change = {"share of kept positions": float(np.mean(shared))}
    if tiles == 1:
        _, rows, other_rows = np.intersect1d(exact["kept"][0], coarse["kept"][0], return_indices=True)
        features, others = exact["image_features"][rows], coarse["image_features"][other_rows]
        change["relative feature error"] = float(np.linalg.norm(features - others) / np.linalg.norm(features))
    return change


def report(shape: str, threads: int, work: Path, rounds: dict[int, int]) -> Report:
    """Measure one tile and five tiles."""
    busy = busy_percent()
    rows: list[dict[str, Cell]] = []
    bars = []
    notes = [
        f"Float32, {threads} threads each, random weights; medians of interleaved rounds, one process a rival.",
        "The graphs run as in a bundle with memory to spare; one as where it is short, its weights mapped.",
    ]
    for tiles, count in rounds.items():
        seconds, resident, differences, change = measure(shape, tiles, threads, work, count)
        for name, samples in seconds.items():
            speedup = Samples((seconds[PUBLISHED].median / samples.median,), "x")
            row: dict[str, Cell] = {"tiles": str(tiles), "rival": name, "time": samples, "against published": speedup}
            rows.append({**row, "resident after": resident[name]})
        title = "1 tile" if tiles == 1 else f"{tiles} tiles"
        ours = seconds[OURS].median
        bars.append(Bar(f"{title}: time, of that without selection", ours / seconds[ALL].median, "<=", 1, "x"))
        bars.append(Bar(f"{title}: published / ours", seconds[PUBLISHED].median / ours, ">=", LEAST_SPEEDUP, "x"))
        notes += [
            f"{title}: {name} differs from the published features by {value:.1e} of the largest value."
            for name, value in differences.items()
        ]
        notes += [f"{title}, 8 bits against fp32: {what} {value:.3f}." for what, value in change.items()]
    return Report(
        name="vision_speed",
        title=f"Vision part of {shape} on the CPU: CLIP tower, 64 tokens a tile, projector",
        busy_percent=busy,
        notes=notes,
        rows=rows,
        bars=bars if shape != "tiny" else (),
        settings={"threads": threads, "shape": shape},
    )


def main() -> None:
    """Parse the command line; measure, or be one of the rivals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-next-13b", help="a recipe's name, 1b or tiny")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="of both; default: 15 of one tile, 3 of five tiles")
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--reports", type=Path, default=REPORTS)
    parser.add_argument("--worker", choices=tuple(RIVALS), help=argparse.SUPPRESS)
    parser.add_argument("--tiles", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape, threads, work = arguments.shape, arguments.threads, arguments.work
    if arguments.worker:
        serve(lambda: prepare(arguments.worker, shape, arguments.tiles, threads, work))
        return
    rounds = {tiles: arguments.rounds or count for tiles, count in ROUNDS.items()}
    report(shape, threads, work, rounds).write(arguments.reports)


if __name__ == "__main__":
    main()
