"""What ``vz-edge profile`` measured, as data: written as JSON, read back strictly.

``times`` of a bundle hold ``load_sec``, ``preprocess_sec``, ``vision_sec``, ``prefill_sec``, ``ttft_sec`` (the sum of
the three before) and ``decode_tokens_per_sec``; ``memory`` holds bytes by stage (``load``, ``picture``, ``prefill``,
``decode``) and kind (vz_edge.profiling.meter).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vz_edge import strict
from vz_edge.arguments import read_text
from vz_edge.budget import TokenBudget
from vz_edge.bundle import WeightSpec
from vz_edge.errors import MeasurementError
from vz_edge.profiling.environment import Environment

FORMAT_VERSION = 1
TIMES = ("load_sec", "preprocess_sec", "vision_sec", "prefill_sec", "ttft_sec", "decode_tokens_per_sec")
STAGES = ("load", "picture", "prefill", "decode")
# The kind that decides whether a bundle fits, where it was measured: the first of these.
DECIDING_KINDS = ("gpu_bytes", "unified_bytes", "peak_rss_bytes")
# Beyond these a difference of a tenth, the default of --fail-above, may be the machine's and not the bundle's.
BUSY_LIMIT_PERCENT = 5.0
SPREAD_LIMIT = 0.10


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one quantity. ``spread`` is (largest - smallest) / median."""

    median: float
    spread: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Samples:
        """Median and spread of one value or more."""
        kept = tuple(values)
        median = statistics.median(kept)
        return cls(median, (max(kept) - min(kept)) / median if median else 0.0, kept)


@dataclass(frozen=True)
class Identity:
    """What makes two measurements ones of the same bundle, run the same way.

    ``budget`` is None for all tokens; ``providers`` are ONNX Runtime's full names, the preferred one first. Where torch
    runs the language model, they name its processor, and ``vision_providers`` are those of vision; None elsewhere.
    """

    name: str
    target: Literal["cpu", "cuda"]
    weights: WeightSpec
    budget: TokenBudget | None
    providers: tuple[str, ...]
    vision_providers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Settings:
    """What was asked of every bundle; ``picture_size`` is (width, height) in pixels, the last as in EdgeModel.load."""

    picture_size: tuple[int, int]
    question: str
    answer_tokens: int
    threads: int
    release_memory: bool | None = None


@dataclass(frozen=True)
class Predicted:
    """What a device profile predicts for a bundle: times by name, memory in bytes by stage; neither has all keys."""

    device: str
    times: dict[str, float]
    memory: dict[str, int]
    peak_bytes: int


@dataclass(frozen=True)
class BundleRun:
    """One bundle's measurements.

    ``cached_share`` is the part of its files that lay in the page cache when loading began, None where not known.
    """

    bundle: str
    identity: Identity
    tiles: int
    image_tokens: int
    prompt_tokens: int
    cached_share: float | None
    times: dict[str, Samples]
    memory: dict[str, dict[str, Samples]]
    predicted: Predicted | None = None
    notes: tuple[str, ...] = ()

    @property
    def deciding_kind(self) -> str:
        """The kind of memory that decides whether the bundle fits."""
        return next(kind for kind in DECIDING_KINDS if kind in self.memory["load"])

    @property
    def peak_bytes(self) -> float:
        """The highest stage of the deciding kind."""
        return max(stage[self.deciding_kind].median for stage in self.memory.values())


@dataclass(frozen=True)
class RunReport:
    """One run of ``vz-edge profile``. ``warnings`` say what disturbed it, ``notes`` what was not measured.

    ``tegrastats_peak_bytes`` is the whole system's on a Jetson, None elsewhere.
    """

    format_version: int
    command: str
    date: str
    environment: Environment
    settings: Settings
    runs: int
    busy_percent: float
    busy_limit_percent: float
    spread_limit: float
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    tegrastats_peak_bytes: int | None
    bundles: tuple[BundleRun, ...]


def disturbances(bundles: Iterable[BundleRun], runs: int, busy_percent: float) -> list[str]:
    """A line for each sign that the figures are not to be trusted: a busy machine, runs that lie apart."""
    found = []
    if busy_percent > BUSY_LIMIT_PERCENT:
        used = f"other processes used {busy_percent:g}% of the processors before the start"
        found.append(f"{used} (limit {BUSY_LIMIT_PERCENT:g}%)")
    if runs == 1:
        found.append("one run: how far runs lie apart is not known")
    for run in bundles:
        quantities = dict(run.times)
        for stage, kinds in run.memory.items():
            quantities |= {f"{stage} {kind}": samples for kind, samples in kinds.items()}
        apart = [f"{name} {it.spread:.0%}" for name, it in quantities.items() if it.spread > SPREAD_LIMIT]
        if apart:
            found.append(f"{run.bundle}: spread above the limit of {SPREAD_LIMIT:.0%}: {', '.join(apart)}")
    return found


def to_json(report: RunReport) -> str:
    """The report as text; ``read_report`` gives it back."""
    return json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n"


def read_report(path: Path) -> RunReport:
    """Read what ``vz-edge profile --json`` wrote. Raises MeasurementError."""
    advice = "expected a file written by 'vz-edge profile --json'"
    try:
        data = json.loads(read_text(path))
    except OSError as error:
        raise MeasurementError(f"{path} cannot be read ({error.strerror}); {advice}") from error
    except (ValueError, RecursionError) as error:
        raise MeasurementError(f"{path} is not JSON ({error}); {advice}") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise MeasurementError(f"{path} has report format {version}, this version reads {FORMAT_VERSION}; {advice}")
    try:
        return strict.load(RunReport, data)
    except strict.SchemaError as error:
        raise MeasurementError(f"{path}: {error}; {advice}") from error
