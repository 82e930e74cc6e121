"""The rows of a run's table, for the terminal and the page alike."""

from __future__ import annotations

from dataclasses import dataclass

from vz_edge.profiling.run_report import SPREAD_LIMIT, STAGES, TIMES, BundleRun, RunReport, Samples

TIME_LABELS = {
    "load_sec": "load",
    "preprocess_sec": "preprocess",
    "vision_sec": "vision",
    "prefill_sec": "prefill",
    "ttft_sec": "first token",
    "decode_tokens_per_sec": "decode",
}
KIND_LABELS = {
    "peak_rss_bytes": "RSS, peak of {stage}",
    "pss_bytes": "PSS after {stage}",
    "gpu_bytes": "GPU after {stage}",
    "unified_bytes": "unified after {stage}",
}
PEAK_LABEL = "peak memory"


@dataclass(frozen=True)
class Cell:
    """One bundle's quantity as text. ``ratio`` is against the first bundle, ``of_predicted`` against the prediction."""

    measured: str
    disturbed: bool
    ratio: str
    predicted: str
    of_predicted: str


@dataclass(frozen=True)
class Row:
    """One quantity of every bundle, in the report's order."""

    label: str
    cells: tuple[Cell, ...]


def rows(report: RunReport) -> list[Row]:
    """Times, memory by stage and kind, and the peak that decides whether a bundle fits."""
    runs = report.bundles
    table = []
    for name in TIMES:
        unit = "tokens/s" if name.endswith("per_sec") else "s"
        table.append(_row(TIME_LABELS[name], unit, 1, [run.times[name] for run in runs], _predicted_times(runs, name)))
    for kind, label in KIND_LABELS.items():
        for stage in STAGES:
            if any(kind in run.memory[stage] for run in runs):
                found = [run.memory[stage].get(kind) for run in runs]
                table.append(_row(label.format(stage=stage), "GB", 1e9, found, _predicted_memory(runs, stage, kind)))
    predicted: list[float | None] = [run.predicted.peak_bytes if run.predicted else None for run in runs]
    peaks: list[Samples | None] = [Samples.of([run.peak_bytes]) for run in runs]
    return [*table, _row(PEAK_LABEL, "GB", 1e9, peaks, predicted)]


def title(run: BundleRun) -> str:
    """A bundle in a few words: folder, bits, tokens."""
    return f"{run.bundle}: {run.identity.weights.bits} bits, {run.image_tokens} image tokens of {run.tiles} tile(s)"


def digits(value: float) -> str:
    """Three significant digits, below a thousandth five decimals: never an exponent."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.5f}"


def _row(
    label: str, unit: str, scale: float, found: list[Samples | None] | list[Samples], predicted: list[float | None]
) -> Row:
    first = found[0]
    cells = [_cell(samples, first, guess, unit, scale) for samples, guess in zip(found, predicted, strict=True)]
    return Row(label, tuple(cells))


def _cell(samples: Samples | None, first: Samples | None, predicted: float | None, unit: str, scale: float) -> Cell:
    guess = f"{digits(predicted / scale)} {unit}" if predicted is not None else ""
    if samples is None:
        return Cell("-", False, "", guess, "")
    spread = f" ({samples.spread:.0%})" if len(samples.values) > 1 else ""
    return Cell(
        measured=f"{digits(samples.median / scale)} {unit}{spread}",
        disturbed=samples.spread > SPREAD_LIMIT,
        ratio=f"{digits(samples.median / first.median)}x" if first and first.median else "",
        predicted=guess,
        of_predicted=f"{digits(samples.median / predicted)}x" if predicted else "",
    )


def _predicted_times(runs: tuple[BundleRun, ...], name: str) -> list[float | None]:
    return [run.predicted.times.get(name) if run.predicted else None for run in runs]


def _predicted_memory(runs: tuple[BundleRun, ...], stage: str, kind: str) -> list[float | None]:
    """Of the kind that decides whether a bundle fits alone: no other is predicted."""
    return [run.predicted.memory.get(stage) if run.predicted and kind == run.deciding_kind else None for run in runs]
