"""What reduced tokens and quantised weights cost in answers: the embedded model, through exported bundles.

    python -m benchmarks.demo_accuracy

Exports ``vz-demo`` with all, 640, 320 and 160 tokens at 16, 8 and 4 bits and asks each bundle the 9,673 test questions
of easy-VQA (PyPI ``easy-vqa``; training never saw its test part) and the questions of generated scenes of an unseen
seed, through EdgeModel.ask_many: greedy, exact match. The vision graph does not depend on the decoder's bits, so a
picture goes through it once a budget.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from benchmarks import bundles
from benchmarks.report import REPORTS, Bar, Cell, Report
from training.scenes import easy_vqa_test, make_scenes
from vz_edge import EdgeModel
from vz_edge.host.export import ExportRequest, SilentProgress, plan_export, write_bundle
from vz_edge.profiling.environment import busy_percent

SCENE_SEED = 90_000
TOKENS, BITS = ("all", "640", "320", "160"), (16, 8, 4)
LEAST_EASY_VQA_PERCENT = 97.0
LONGEST_ANSWER_TOKENS = 8
Tally = dict[tuple[str, int, str], tuple[int, int]]  # (tokens, bits, kind) -> right, asked


class Pictured(NamedTuple):
    """A picture and its questions as (question, answer, kind)."""

    image: Path | Image.Image
    questions: list[tuple[str, str, str]]


def export_all(work: Path) -> None:
    """Write the twelve bundles."""
    for tokens in TOKENS:
        for bits in BITS:
            out = work / f"vz-demo-{tokens}-{bits}"
            request = ExportRequest(bundles.DEMO, out, bits=bits, tokens=tokens, force=True)
            write_bundle(plan_export(request), SilentProgress())


def pictures(easy_vqa: int, scenes: int, part: int, parts: int) -> Iterator[Pictured]:
    """Every ``parts``-th picture of both sets, beginning with number ``part``."""
    for path, pairs in easy_vqa_test()[part:easy_vqa:parts]:
        yield Pictured(path, [(question, answer, "easy-VQA") for question, answer in pairs])
    for scene in make_scenes(SCENE_SEED, scenes)[part::parts]:
        asked = [(question, answer, f"scenes, {kind}") for question, answer, kind in scene.questions]
        yield Pictured(scene.image, asked)


def ask_part(work: Path, tokens: str, easy_vqa: int, scenes: int, part: int, parts: int) -> Tally:
    """Ask one budget's bundles about a part of the pictures, on one thread."""
    models = {bits: EdgeModel.load(work / f"vz-demo-{tokens}-{bits}", threads=1) for bits in BITS}
    tally: Tally = defaultdict(lambda: (0, 0))
    for image, questions in pictures(easy_vqa, scenes, part, parts):
        seen = models[16].encode(image)
        texts = [question for question, _, _ in questions]
        for bits, model in models.items():
            replies = model.ask_many(seen, texts, max_new_tokens=LONGEST_ANSWER_TOKENS)
            for reply, (_, answer, kind) in zip(replies, questions, strict=True):
                right, asked = tally[tokens, bits, kind]
                tally[tokens, bits, kind] = right + (reply.text.strip() == answer), asked + 1
    return dict(tally)


def measure(work: Path, easy_vqa: int, scenes: int, workers: int) -> Tally:
    """All budgets, the pictures split over ``workers`` processes."""
    total: Tally = defaultdict(lambda: (0, 0))
    with ProcessPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(ask_part, work, tokens, easy_vqa, scenes, part, workers)
            for tokens in TOKENS
            for part in range(workers)
        ]
        for job in jobs:
            for key, (right, asked) in job.result().items():
                total[key] = total[key][0] + right, total[key][1] + asked
            print(f"{sum(asked for _, asked in total.values())} answers", file=sys.stderr, flush=True)
    return dict(total)


def percent(tally: Tally, tokens: str, bits: int, kind: str) -> float:
    """Right answers in percent; ``kind`` may be the beginning of several kinds."""
    chosen = [count for (t, b, k), count in tally.items() if (t, b) == (tokens, bits) and k.startswith(kind)]
    right, asked = (sum(numbers) for numbers in zip(*chosen, strict=True))
    return 100 * right / asked


def report(tally: Tally, busy: float) -> Report:
    """A row a kind of question, a column a budget and precision."""
    kinds = sorted({kind for _, _, kind in tally})
    rows: list[dict[str, Cell]] = []
    for kind in [*kinds, "scenes"]:
        asked = sum(count for (t, b, k), (_, count) in tally.items() if (t, b) == ("all", 16) and k.startswith(kind))
        cells: dict[str, Cell] = {"questions": "scenes, all kinds" if kind == "scenes" else kind, "number": str(asked)}
        for tokens in TOKENS:
            for bits in BITS:
                cells[f"{tokens} tokens, {bits} bits"] = f"{percent(tally, tokens, bits, kind):.1f}"
        rows.append(cells)
    easy = percent(tally, "all", 16, "easy-VQA")
    return Report(
        name="demo_accuracy",
        title="vz-demo: right answers in percent by token budget and bits of the decoder's weights",
        busy_percent=busy,
        notes=[
            "Exported bundles on the CPU, greedy, exact match; 16 bits are float32 on this target.",
            "Tokens are the total of a picture of 5 tiles; an easy-VQA picture has 2 tiles and two fifths of them.",
            "lm_head has 8 bits in the 4-bit bundles; tower and projector are not quantised.",
        ],
        rows=rows,
        bars=[Bar("easy-VQA, all tokens, 16 bits", easy, ">=", LEAST_EASY_VQA_PERCENT, "%")],
    )


def main() -> None:
    """Export, ask, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--easy-vqa", type=int, default=1000, help="test pictures of easy-VQA")
    parser.add_argument("--scenes", type=int, default=300, help="scene pictures")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--reports", type=Path, default=REPORTS)
    arguments = parser.parse_args()
    busy = busy_percent()
    export_all(arguments.work)
    tally = measure(arguments.work, arguments.easy_vqa, arguments.scenes, arguments.workers)
    report(tally, busy).write(arguments.reports)


if __name__ == "__main__":
    main()
