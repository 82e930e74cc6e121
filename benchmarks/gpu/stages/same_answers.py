"""Stage "same_answers": a bundle of ``--target cuda`` on the card, beside that of ``--target cpu`` on the processor.

vz-demo, whose answers mean something, is exported for both at 4 bits and 320 tokens (a rehearsal with ``--shape tiny``
takes random weights, whose answers hang by less). float16 and another order of sums move numbers a little, so what is
held against a bar is how far and how often.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.bundles import NEAREST, checkpoint_folder
from benchmarks.gpu.loading import load
from benchmarks.gpu.stage import Record, Settings
from benchmarks.report import Bar
from training.scenes import make_scenes
from vz_edge.device.decoder import Decoder
from vz_edge.device.model import EdgeModel
from vz_edge.device.process import one_line
from vz_edge.device.prompt import messages_of
from vz_edge.device.runtime import CUDA, CUDA_OPTIONS
from vz_edge.device.verify import kept_agreement
from vz_edge.device.vision import VisionResult
from vz_edge.host.export import ExportRequest, SilentProgress, plan_export, write_bundle

TARGETS = ("cpu", "cuda")
SCENE_SEED, SCENES, QUESTIONS_PER_SCENE = 90_000, 5, 4  # no scene of the training
ANSWER_TOKENS = 8
GRAPH_TOKENS = 1024
LEAST_KEPT, LARGEST_FEATURES, LARGEST_LOGITS = 0.95, 0.05, 0.05  # as vz_edge.device.verify asks of another processor
LEAST_SAME = 18
LARGEST_WITHIN = 0.02  # between two ways of reading the same tokens on one device
TABLE = "CUDA bundle beside the processor's"


def run(settings: Settings, record: Record) -> None:
    """Export both, and compare."""
    if settings.shape == "tiny":
        checkpoint_folder("tiny", Path(settings.work))  # made once, before two read it
    with ProcessPoolExecutor(len(TARGETS), get_context("spawn")) as pool:
        exports = {target: pool.submit(_export, settings, target) for target in TARGETS}
        folders = {target: export.result() for target, export in exports.items()}
    ours, theirs = load(folders["cuda"], settings), EdgeModel.load(folders["cpu"], "cpu")
    _provider_options(ours, settings, record)
    scenes = make_scenes(SCENE_SEED, SCENES)
    looks = [(ours.encode(scene.image), theirs.encode(scene.image)) for scene in scenes]
    _vision(looks, record)
    _logits(ours, theirs, looks, record)
    asked = [
        (seen, question)
        for scene, seen in zip(scenes, looks, strict=True)
        for question, _, _ in scene.questions[:QUESTIONS_PER_SCENE]
    ]
    answers = [
        _answers(model, [(seen[side], text) for seen, text in asked]) for side, model in enumerate((ours, theirs))
    ]
    same = sum(first == second for first, second in zip(*answers, strict=True))
    record.measured("answers", [list(pair) for pair in zip(*answers, strict=True)])
    record.row(TABLE, {"what": "answers that are the same", "value": f"{same} of {len(asked)}"})
    record.bar(Bar("same answers", same, ">=", LEAST_SAME, f"of {len(asked)}"))
    graph_same = _with_graph(folders["cuda"], settings, [(seen[0], text) for seen, text in asked], answers[0], record)
    within = _contexts(ours.decoder, record)
    record.line(f"{same} of {len(asked)} answers, {graph_same} of {len(asked)} by a CUDA graph; contexts {within:.1e}")


def _export(settings: Settings, target: str) -> Path:
    work = Path(settings.work)
    folder = work / f"same-answers-{settings.shape}-{target}"
    model = "vz-demo" if settings.shape == "true" else str(checkpoint_folder("tiny", work))
    quantizer = NEAREST[1] if settings.shape == "tiny" else None
    request = ExportRequest(
        model,
        folder,
        bits=4,
        tokens="320",
        target=target,
        quantizer=quantizer,
        force=True,  # type: ignore[arg-type]
    )
    write_bundle(plan_export(request), SilentProgress())
    return folder


def _provider_options(model: EdgeModel, settings: Settings, record: Record) -> None:
    """Every option that the device side sets must be what the session says that it has."""
    if settings.device != "cuda":
        record.note("Provider options are CUDA's: not compared on a processor.")
        return
    found = model.decoder.session.get_provider_options()[CUDA]  # type: ignore[attr-defined]
    for name, value in CUDA_OPTIONS.items():
        taken = str(found.get(name, "not there"))
        record.row("provider options", {"option": name, "set": value, "taken": taken})
        record.bar(Bar(f"option {name} is taken", float(taken.lower() == value.lower()), ">=", 1, ""))
    record.measured("provider_options", found)


def _vision(looks: list[tuple[VisionResult, VisionResult]], record: Record) -> None:
    kept = min(kept_agreement(ours.kept, theirs.kept) for ours, theirs in looks)  # type: ignore[arg-type]
    errors = [
        np.abs(ours.features.astype(np.float32) - theirs.features).max() / np.abs(theirs.features).max()
        for ours, theirs in looks
        if np.array_equal(ours.kept, theirs.kept)  # another position moves whole rows
    ]
    record.row(TABLE, {"what": "kept positions that are the same, least of a picture", "value": f"{kept:.2%}"})
    record.bar(Bar("kept positions that are the same", 100 * kept, ">=", 100 * LEAST_KEPT, "%"))
    if errors:
        error = float(max(errors))
        text = f"{error:.1e} of the largest, {len(errors)} of {len(looks)} pictures with the same positions"
        record.row(TABLE, {"what": "vision features", "value": text})
        record.bar(Bar("vision features", error, "<=", LARGEST_FEATURES, "of the largest"))


def _logits(ours: EdgeModel, theirs: EdgeModel, looks: list[tuple[VisionResult, VisionResult]], record: Record) -> None:
    """Of both decoders after the same embeddings."""
    ids = theirs.chat.ids(messages_of("what is there?", 1))
    distances = []
    for _, seen in looks:
        embeds = theirs.embedding.place(ids, theirs.chat.image_token_id, [seen.features])
        expected, found = (model.decoder.start(len(embeds)).append(embeds) for model in (theirs, ours))
        distances.append(_distance(found, expected))
    record.row(TABLE, {"what": "logits, relative distance, largest", "value": f"{max(distances):.1e}"})
    record.bar(Bar("logits", max(distances), "<=", LARGEST_LOGITS, "relative"))


def _answers(model: EdgeModel, asked: list[tuple[VisionResult, str]]) -> list[str]:
    return [model.ask(seen, text, max_new_tokens=ANSWER_TOKENS).text for seen, text in asked]


def _with_graph(
    folder: Path, settings: Settings, asked: list[tuple[VisionResult, str]], expected: list[str], record: Record
) -> int:
    """How many answers are the same by a CUDA graph."""
    what = {"what": "answers by a CUDA graph that are those without it"}
    try:
        model = load(folder, settings, GRAPH_TOKENS)
        same = sum(a == b for a, b in zip(_answers(model, asked), expected, strict=True))
    except Exception as error:  # the capture's own errors share no base class
        record.row(TABLE, what | {"failed": one_line(error)})
        return 0
    record.row(TABLE, what | {"value": f"{same} of {len(asked)}"})
    record.bar(Bar("same answers by a CUDA graph", same, ">=", len(asked), f"of {len(asked)}"))
    return same


def _contexts(decoder: Decoder, record: Record) -> float:
    """Reading at once, in pieces, after going back, and in a fork: the largest distance between their logits."""
    embeds = np.random.default_rng(0).standard_normal((24, decoder.hidden_size)).astype(decoder.dtype) * 0.1
    expected = decoder.start(24).append(embeds)
    pieces = decoder.start(24)
    for start in range(0, 24, 8):
        in_pieces = pieces.append(embeds[start : start + 8])
    pieces.rewind(16)
    rewound = pieces.append(embeds[16:])
    pieces.rewind(8)
    twin = pieces.fork()
    pieces.append(embeds[:16])  # what the fork has must not change by it
    forked = twin.append(embeds[8:])
    found = {"in pieces": in_pieces, "after going back": rewound, "in a fork": forked}
    for what, logits in found.items():
        distance = _distance(logits, expected)
        record.row("one decoder, read in another way", {"how": what, "relative distance": f"{distance:.1e}"})
    worst = max(_distance(logits, expected) for logits in found.values())
    record.bar(Bar("logits of contexts in pieces, rewound and forked", worst, "<=", LARGEST_WITHIN, "relative"))
    return worst


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
