"""Is this run worse than an earlier one? For a user's CI: ``vz-edge profile --baseline report.json --fail-above 10%``.

Compared are medians: the times of a run's stages, the rate of decoding and the peak of the memory that decides whether
the bundle fits. Load time is not: it was measured once, and follows the page cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from vz_edge.errors import MeasurementError, RequestError
from vz_edge.profiling.environment import Environment
from vz_edge.profiling.run_report import TIMES, BundleRun, Identity, RunReport, Settings

HARDWARE = ("cpu", "cores", "gpus", "board", "power_mode")


def parse_share(text: str) -> float:
    """The share that a percentage means: 0.1 for "10%" or "10". Raises RequestError."""
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent < float("inf"):
        raise RequestError(f"--fail-above {text}: expected a percentage such as 10%")
    return percent / 100


def check_comparable(
    path: Path, baseline: RunReport, settings: Settings, environment: Environment, identities: Sequence[Identity]
) -> None:
    """Raise MeasurementError where ``baseline``, read from ``path``, is of other bundles, settings or hardware."""
    there = [run.identity for run in baseline.bundles]
    if len(there) != len(identities):
        raise MeasurementError(
            f"{path} holds {len(there)} bundle(s), {len(identities)} are to be measured; give the same ones, in order"
        )
    differences = [
        *(_differing(a, b, f"bundle {n + 1}'s ") for n, (a, b) in enumerate(zip(there, identities, strict=True))),
        _differing(baseline.environment, environment, "the machine's ", HARDWARE),
        _differing(baseline.settings, settings, "the run's "),
    ]
    if difference := next(filter(None, differences), None):
        raise MeasurementError(f"{path} cannot be compared with: {difference}; measure a new baseline ('--json')")


def regressions(baseline: RunReport, report: RunReport, limit: float) -> list[str]:
    """A line for each quantity that is worse than in ``baseline`` by more than ``limit`` (0.1: 10 %).

    Slower decoding is counted as time a token. Where either run's own values lie further apart than the reports'
    limit, the line says so. Raises MeasurementError where memory was measured in another way.
    """
    return [
        line
        for before, now in zip(baseline.bundles, report.bundles, strict=True)
        for line in _worse(before, now, limit, report.spread_limit)
    ]


def _worse(before: BundleRun, now: BundleRun, limit: float, spread_limit: float) -> list[str]:
    lines = []
    for name in TIMES:
        if name == "load_sec":
            continue
        old, new = before.times[name], now.times[name]
        numerator, denominator = (old, new) if name.endswith("per_sec") else (new, old)
        by = numerator.median / denominator.median - 1
        if by > limit:
            spread = max(old.spread, new.spread)
            doubt = f"; disturbed: runs lie {spread:.0%} apart" if spread > spread_limit else ""
            lines.append(f"{now.bundle}: {name} {old.median:.4g} -> {new.median:.4g}, {by:.1%} worse{doubt}")
    if before.deciding_kind != now.deciding_kind:
        raise MeasurementError(
            f"{now.bundle}: the baseline measured {before.deciding_kind}, this run {now.deciding_kind}; compare on a "
            "machine set up as it was (NVML), or measure a new baseline"
        )
    by = now.peak_bytes / before.peak_bytes - 1
    if by > limit:
        sizes = f"{before.peak_bytes / 1e9:.3f} -> {now.peak_bytes / 1e9:.3f} GB"
        lines.append(f"{now.bundle}: {now.deciding_kind} {sizes}, {by:.1%} worse")
    return lines


def _differing(there: object, here: object, of: str, names: Sequence[str] | None = None) -> str | None:
    """The first field (of ``names``, by default all) that two dataclasses of one type have with different values."""
    for name in names or [field.name for field in dataclasses.fields(there)]:  # type: ignore[arg-type]
        old, new = getattr(there, name), getattr(here, name)
        if old != new:
            return f"{of}{name} was {old}, is {new}"
    return None
