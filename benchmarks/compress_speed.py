"""``vz_edge.compress`` on the CPU: CLIP ViT-L/14-336 and a 1 B decoder in transformers, a picture of a 2 x 2 grid.

    python -m benchmarks.compress_speed                                          # needs 12 GB of memory
    python -m benchmarks.compress_speed --shape tiny --rounds 1 --reports build/reports

Three rivals with the same random weights in float32 and the same picture, each in a process of its own, in
interleaved rounds:

* the model compressed to 320 tokens
* the same model as transformers runs it, with all tokens
* the vision part the published way (published_vision.py): eager attention in all 24 layers, attention kept

Of the first two the whole way to the first token is measured, in two stages: vision is ``get_image_features``,
prefill is the language model over the prompt with these features in it, ending with the logits of its last position.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bundles
from benchmarks.make_checkpoint import model_of_shape
from benchmarks.report import GB, REPORTS, Bar, Cell, Report, Samples
from vz_edge.budget import split_tokens
from vz_edge.device.runtime import CPU
from vz_edge.profiling.environment import busy_percent
from vz_edge.profiling.meter import MemoryMeter
from vz_edge.profiling.processes import interleave, serve, workers

COMPRESSED, VANILLA, PUBLISHED = (
    "vz_edge.compress, 320 tokens",
    "transformers, all tokens",
    "published way, vision only",
)
RIVALS = {"compressed": COMPRESSED, "vanilla": VANILLA, "published": PUBLISHED}
TOKENS = 320
TILES_PER_ROW = 2
PROMPT = "USER: <image>\nWhat is to the left of the bus? ASSISTANT:"
ROUNDS = 3
LEAST_VISION_SPEEDUP = 1.3
LEAST_PREFILL_SPEEDUP = 8.0


def prepare(rival: str, shape: str, threads: int, work: Path) -> Callable[[dict], dict]:
    """Load a rival; the returned function runs it once."""
    import torch

    torch.set_num_threads(threads)
    folder = bundles.checkpoint_folder(shape, work)
    make = _published if rival == "published" else _transformers
    run = make(rival, folder, shape)
    meter = MemoryMeter(CPU)

    def measure(request: dict) -> dict:
        meter.begin_stage()
        with torch.inference_mode():
            answer = run()
        return answer | meter.end_stage()

    return measure


def _transformers(rival: str, folder: Path, shape: str) -> Callable[[], dict]:
    import torch
    from transformers import AutoModelForImageTextToText

    import vz_edge
    from benchmarks.random_model import stock_processor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = stock_processor(model_of_shape(shape), folder)
    if rival == "compressed":
        processor = vz_edge.compress(model, processor, TOKENS)
    inputs = processor(images=_picture(shape), text=PROMPT, return_tensors="pt")
    ids = inputs["input_ids"]
    is_image = ids == processor.image_token_id

    def run() -> dict:
        start = time.perf_counter()
        features = torch.cat(
            list(model.get_image_features(inputs["pixel_values"], image_sizes=inputs["image_sizes"]).pooler_output)
        )
        encoded = time.perf_counter()
        embeds = model.get_input_embeddings()(ids).masked_scatter(is_image.unsqueeze(-1), features)
        model(inputs_embeds=embeds, logits_to_keep=1)
        answered = time.perf_counter()
        return {
            "vision_sec": encoded - start,
            "prefill_sec": answered - encoded,
            "image_tokens": len(features),
            "prompt_tokens": ids.shape[1],
        }

    return run


def _published(rival: str, folder: Path, shape: str) -> Callable[[], dict]:
    from benchmarks.published_vision import published
    from benchmarks.random_model import stock_processor
    from vz_edge.host.checkpoint import Checkpoint

    model = model_of_shape(shape)
    budget = split_tokens(TOKENS, model.max_tiles, model.tower.patches)
    features = published(Checkpoint.open(folder), model, budget)
    processor = stock_processor(model, folder)
    pixel_values = processor(images=_picture(shape), text=PROMPT, return_tensors="pt")["pixel_values"]

    def run() -> dict:
        start = time.perf_counter()
        tokens = features(pixel_values[0], TILES_PER_ROW)
        return {"vision_sec": time.perf_counter() - start, "image_tokens": len(tokens)}

    return run


def _picture(shape: str) -> np.ndarray:
    """Random pixels that fill a grid of 2 x 2 tiles, uint8 [height, width, 3]."""
    side = TILES_PER_ROW * model_of_shape(shape).tower.image_size
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def report(shape: str, threads: int, work: Path, rounds: int) -> Report:
    """Measure all rivals."""
    busy = busy_percent()
    bundles.checkpoint_folder(shape, work)
    base = [sys.executable, "-m", "benchmarks.compress_speed", "--shape", shape, "--work", str(work)]
    commands = {name: [*base, "--threads", str(threads), "--worker", rival] for rival, name in RIVALS.items()}
    with workers(commands, threads) as rivals:
        answers = interleave(rivals, {}, rounds)
    rows: list[dict[str, Cell]] = [_row(name, given) for name, given in answers.items()]

    def speedup(slow: str, fast: str, stage: str) -> float:
        return _samples(answers[slow], stage).median / _samples(answers[fast], stage).median

    memory = {name: max(answer["peak_rss_bytes"] for answer in answers[name]) for name in (COMPRESSED, VANILLA)}
    bars = [
        Bar(
            "vision: published / compressed",
            speedup(PUBLISHED, COMPRESSED, "vision_sec"),
            ">=",
            LEAST_VISION_SPEEDUP,
            "x",
        ),
        Bar(
            "prefill: all tokens / compressed",
            speedup(VANILLA, COMPRESSED, "prefill_sec"),
            ">=",
            LEAST_PREFILL_SPEEDUP,
            "x",
        ),
        Bar("peak memory: compressed / all tokens", memory[COMPRESSED] / memory[VANILLA], "<=", 1, "x"),
    ]
    prompts = {name: answers[name][0]["prompt_tokens"] for name in (COMPRESSED, VANILLA)}
    return Report(
        name="compress_speed",
        title=f"vz_edge.compress in transformers on the CPU, {shape}",
        busy_percent=busy,
        notes=[
            f"Float32, {threads} threads, random weights; medians of {rounds} interleaved rounds, one process a rival.",
            f"Prompts are {prompts[COMPRESSED]} and {prompts[VANILLA]} tokens long, the question included. With all "
            "tokens a picture that fills a 2 x 2 grid costs 576 of the base tile, 48 x 48 of the grid and 48 newlines: "
            "2928, where the paper counts 2880.",
            "Memory is the highest resident memory of the process in a round, weights included.",
        ],
        rows=rows,
        bars=bars if shape != "tiny" else (),
        settings={"threads": threads, "shape": shape, "tokens": TOKENS},
    )


def _row(name: str, given: list[dict]) -> dict[str, Cell]:
    has_prefill = "prefill_sec" in given[0]
    return {
        "rival": name,
        "image tokens": str(given[0]["image_tokens"]),
        "vision": _samples(given, "vision_sec"),
        "prefill": _samples(given, "prefill_sec") if has_prefill else "–",
        "peak memory": Samples(tuple(answer["peak_rss_bytes"] / GB for answer in given), "GB"),
    }


def _samples(given: list[dict], stage: str) -> Samples:
    return Samples(tuple(answer[stage] for answer in given), "s")


def main() -> None:
    """Parse the command line; measure, or be one of the rivals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("1b", "tiny"), default="1b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--reports", type=Path, default=REPORTS)
    parser.add_argument("--worker", choices=tuple(RIVALS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape, threads, work = arguments.shape, arguments.threads, arguments.work
    if arguments.worker:
        serve(lambda: prepare(arguments.worker, shape, threads, work))
        return
    report(shape, threads, work, arguments.rounds).write(arguments.reports)


if __name__ == "__main__":
    main()
