"""Stage "plan": what the stage "headline" measured beside what ``vz-edge plan`` predicts for the card.

Then the shares of ``profiles/runtimes/onnxruntime.yaml`` that are assumed for this class of card, computed back from
the measurements (efficiencies.py), as lines of that file, and the predictions that they would have given.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.gpu.efficiencies import Timed, solve, with_figures, yaml_lines
from benchmarks.gpu.rivals import RIVALS, SMALL_ALL, SMALL_REDUCED, SMALL_VANILLA, Rival
from benchmarks.gpu.stage import Record, Settings
from benchmarks.gpu.stages.headline import peak_bytes, this_card
from benchmarks.report import GB, Bar
from vz_edge.errors import MeasurementError
from vz_edge.planning.devices import DeviceProfile, load_device
from vz_edge.planning.predict import Prediction, predict
from vz_edge.planning.question import Question
from vz_edge.planning.roofline import Efficiency, load_runtime
from vz_edge.profiling.run_table import digits

REHEARSAL_CARD = "h100-80"
LARGEST_ERROR_PERCENT = 20.0
TABLE = "predicted / measured (error)"
BARRED = ("vision", "prefill", "first token", "decode", "memory")


def run(settings: Settings, record: Record) -> None:
    """Compare, solve, compare again."""
    path = Path(settings.out) / "headline.json"
    rivals = json.loads(path.read_text(encoding="utf-8"))["measured"].get("rivals", {}) if path.exists() else {}
    timed = {rival: found for rival in RIVALS if (found := timed_of(rival, rivals.get(rival.name, {}), settings))}
    if not timed:
        raise MeasurementError(f"{path} has no times; run the stage 'headline' first")
    device = this_card() or load_device(REHEARSAL_CARD)
    if this_card() is None:
        record.note(f"There is no profile of this machine's card: predicted for {device.name}, which it is not.")
    known = load_runtime("onnxruntime").efficiency(device.device_class)
    errors = _compare(f"{TABLE}, as shipped, {device.name}", timed, rivals, device, None, record)
    for what in BARRED:
        if what in errors and settings.shape == "true" and settings.device == "cuda":
            limit = LARGEST_ERROR_PERCENT
            record.bar(Bar(f"{what}: farthest prediction", 100 * errors[what], "<=", limit, "% off"))
    record.measured("largest_error", errors)
    record.line(", ".join(f"{what} {error:.0%} off at most" for what, error in errors.items()))
    needed = (SMALL_VANILLA, SMALL_ALL, SMALL_REDUCED)
    if not all(rival in timed for rival in needed):
        record.note("Too few models were measured to compute the runtime's efficiencies.")
        return
    launches = load_runtime("onnxruntime").launches
    solved = solve(*(timed[rival] for rival in needed), device, launches, known)
    for note in solved.notes:
        record.note(note)
    for name, value in solved.figures.items():
        old = _figure(known, name)
        record.row("efficiencies", {"figure": name, "in the file": f"{old:.3g}", "measured": f"{value:.3g}"})
    source = f"benchmarks.gpu.truth on {device.title}, LLaVA-NeXT's shapes"
    record.block(
        f"profiles/runtimes/onnxruntime.yaml, classes.{device.device_class}", yaml_lines(solved, known, source)
    )
    corrected = with_figures(known, solved)
    after = _compare(f"{TABLE}, with the measured efficiencies", timed, rivals, device, corrected, record)
    record.measured("largest_error_after", after)


def timed_of(rival: Rival, found: dict[str, Any], settings: Settings) -> Timed | None:
    """Medians of what was measured of it; None where nothing was."""
    rounds = found.get("without_graph")
    if not rounds:
        return None

    def median(name: str) -> float:
        return statistics.median(one[name] for one in rounds)

    answer_tokens = rounds[0]["answer_tokens"]
    model = rival.model(settings)
    graph = [one["decode_sec"] for one in found.get("with_graph", ())]
    per_tile = model.tower.patches if rival.tokens is None else rival.tokens // model.max_tiles
    return Timed(
        model,
        rival.weights,
        Question(found["tiles"], found["image_tokens"], per_tile, found["prompt_tokens"], answer_tokens),
        median("preprocess_sec"),
        median("vision_sec"),
        median("prefill_sec"),
        median("decode_sec") / (answer_tokens - 1),
        median("token_sec"),
        statistics.median(graph) / (answer_tokens - 1) if graph else None,
    )


def _compare(
    title: str,
    timed: dict[Rival, Timed],
    rivals: dict[str, Any],
    device: DeviceProfile,
    efficiency: Efficiency | None,
    record: Record,
) -> dict[str, float]:
    """Add a row per model; the largest relative error by what was predicted."""
    errors: dict[str, float] = {}
    for rival, measured in timed.items():
        question = measured.question
        prediction = predict(
            measured.model,
            measured.weights,
            rival.tokens,
            question.tiles,
            device,
            "onnxruntime",
            question.prompt_tokens,
            question.answer_tokens,
            efficiency=efficiency,
        )
        cells = {"model": rival.name}
        for what, predicted, found, unit in _pairs(prediction, measured, rivals[rival.name]):
            error = predicted / found - 1
            errors[what] = max(abs(error), errors.get(what, 0.0))
            cells[what] = f"{digits(predicted)} / {digits(found)} {unit} ({error:+.0%})"
        record.row(title, cells)
    return errors


def _pairs(prediction: Prediction, measured: Timed, found: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    first_sec = measured.preprocess_sec + measured.vision_sec + measured.prefill_sec
    pairs = [
        ("preprocess", 1e3 * prediction.preprocess_sec, 1e3 * measured.preprocess_sec, "ms"),
        ("vision", 1e3 * prediction.vision_sec, 1e3 * measured.vision_sec, "ms"),
        ("prefill", 1e3 * prediction.prefill_sec, 1e3 * measured.prefill_sec, "ms"),
        ("first token", 1e3 * prediction.ttft_sec, 1e3 * first_sec, "ms"),
        ("decode", prediction.tokens_per_sec, 1 / measured.decode_sec_per_token, "tokens/s"),
    ]
    if "memory" in found:
        peak = peak_bytes(found["memory"], found["kind"])
        pairs.append(("memory", prediction.memory.peak_bytes / GB, peak / GB, "GB"))
    return pairs


def _figure(known: Efficiency, name: str) -> float:
    if name.startswith("linear."):
        return known.linear[name.removeprefix("linear.")].share
    return known.attention.share if name == "attention" else getattr(known, name).value
