"""A run of ``vz-edge profile``: what to measure, the workers that are measured, and their answers as a report.

>>> plan = plan_run([Path("llava-13b"), Path("llava-7b")], RunOptions())
>>> report = measure(plan, progress=lambda text: None)
"""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_edge.bundle import Manifest, read_manifest
from vz_edge.device.backend import choose_backend
from vz_edge.device.image import token_count
from vz_edge.device.machine import l4t_release
from vz_edge.device.memory_check import available_memory_bytes, check_memory, memory_need
from vz_edge.device.runtime import on_device, physical_cores, provider_name
from vz_edge.errors import RequestError
from vz_edge.profiling.environment import RUN_PACKAGES, TORCH_PACKAGES, Environment, busy_percent, environment
from vz_edge.profiling.measure import QUESTION
from vz_edge.profiling.processes import interleave, workers
from vz_edge.profiling.run_report import (
    BUSY_LIMIT_PERCENT,
    FORMAT_VERSION,
    SPREAD_LIMIT,
    BundleRun,
    Identity,
    RunReport,
    Samples,
    Settings,
    disturbances,
)
from vz_edge.profiling.tegrastats import RamPeak, watch_ram
from vz_edge.recipe import ModelSpec


@dataclass(frozen=True)
class RunOptions:
    """What a user may choose; None takes what ``plan_run`` finds best.

    ``picture_size`` is (width, height) in pixels: by default one that gives the most tiles. ``providers``, ``threads``
    and ``release_memory`` are as in ``EdgeModel.load``; ``device_id`` is its ``device``.
    """

    runs: int = 5
    answer_tokens: int = 64
    picture_size: tuple[int, int] | None = None
    providers: tuple[str, ...] | None = None
    threads: int | None = None
    device_id: int | None = None
    release_memory: bool | None = None


@dataclass(frozen=True)
class PlannedBundle:
    """A bundle that is there, can be run and fits into memory."""

    folder: Path
    manifest: Manifest
    identity: Identity


@dataclass(frozen=True)
class RunPlan:
    """Everything that can be wrong has been checked. ``providers`` and ``device_id`` are as in RunOptions."""

    bundles: tuple[PlannedBundle, ...]
    settings: Settings
    providers: tuple[str, ...] | None
    runs: int
    environment: Environment
    device_id: int | None = None


def plan_run(folders: Sequence[Path], options: RunOptions) -> RunPlan:
    """Check the request, read the manifests and choose what runs each bundle, as loading does; none is loaded.

    Raises RequestError, BundleError, ProviderError, DependencyError, or InsufficientMemoryError where the bundles,
    which are loaded at the same time, do not fit into the memory that is available.
    """
    for name, value, least in (
        ("--runs", options.runs, 1),
        ("--answer-tokens", options.answer_tokens, 2),  # the first token is prefill's
        ("--threads", options.threads, 1),
    ):
        if value is not None and value < least:
            raise RequestError(f"{name} {value} is impossible; expected {least} or more")
    manifests = [read_manifest(folder) for folder in folders]
    size = options.picture_size or largest_picture([manifest.model for manifest in manifests])
    bundles = [
        PlannedBundle(folder, manifest, _identity(folder, manifest, options))
        for folder, manifest in zip(folders, manifests, strict=True)
    ]
    _check_memory(bundles, size, options)
    threads = options.threads or physical_cores()
    settings = Settings(size, QUESTION, options.answer_tokens, threads, options.release_memory)
    in_torch = any(manifest.format == "bnb" for manifest in manifests)
    machine = environment((*RUN_PACKAGES, *TORCH_PACKAGES) if in_torch else RUN_PACKAGES)
    return RunPlan(tuple(bundles), settings, options.providers, options.runs, machine, options.device_id)


def largest_picture(models: Sequence[ModelSpec]) -> tuple[int, int]:
    """(width, height) in pixels of a picture that gives the model with the most tiles all of them.

    It is the largest grid itself; without grids, twice a tile's side, so that there is something to scale.
    """
    model = max(models, key=lambda model: model.max_tiles)
    side = model.tower.image_size
    height, width = max(model.grid_pinpoints, key=lambda pinpoint: pinpoint[0] * pinpoint[1], default=(2 * side,) * 2)
    return width, height


def measure(plan: RunPlan, progress: Callable[[str], None]) -> RunReport:
    """Load the bundles, each in a process of its own, and measure them in turn.

    ``progress(what)`` is called before each of ``steps(plan)`` steps. Raises MeasurementError.
    """
    busy = busy_percent()
    commands = {_key(number, bundle): _command(bundle, plan) for number, bundle in enumerate(plan.bundles)}
    request = {"what": "round", "size": plan.settings.picture_size, "answer_tokens": plan.settings.answer_tokens}
    is_jetson = l4t_release() is not None
    with ExitStack() as stack:
        system = stack.enter_context(watch_ram()) if is_jetson else RamPeak()
        rivals = stack.enter_context(workers(commands, plan.settings.threads, lambda key: progress(f"load {key}")))
        loads = {key: worker.ask({"what": "load"}) for key, worker in rivals.items()}
        answers = interleave(rivals, request, plan.runs, lambda key, number: progress(f"{_round_name(number)} {key}"))
    runs = [
        bundle_run(bundle, loads[key], answers[key], plan.settings.answer_tokens)
        for key, bundle in zip(commands, plan.bundles, strict=True)
    ]
    unwatched = is_jetson and system.bytes is None
    return RunReport(
        format_version=FORMAT_VERSION,
        command=shlex.join(["vz-edge", *sys.argv[1:]]),
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        environment=plan.environment,
        settings=plan.settings,
        runs=plan.runs,
        busy_percent=busy,
        busy_limit_percent=BUSY_LIMIT_PERCENT,
        spread_limit=SPREAD_LIMIT,
        warnings=tuple(disturbances(runs, plan.runs, busy)),
        notes=("tegrastats is missing or said nothing: memory was read between stages only",) if unwatched else (),
        tegrastats_peak_bytes=system.bytes,
        bundles=tuple(runs),
    )


def steps(plan: RunPlan) -> int:
    """How often ``measure`` calls its progress: a load, a warm-up and the runs of every bundle."""
    return len(plan.bundles) * (plan.runs + 2)


def bundle_run(
    bundle: PlannedBundle, load: dict[str, Any], answers: Sequence[dict[str, Any]], answer_tokens: int
) -> BundleRun:
    """A worker's answers (vz_edge.profiling.measure) as one bundle's measurements."""
    times = {"load_sec": Samples.of([load["load_sec"]])}
    for name in ("preprocess_sec", "vision_sec", "prefill_sec"):
        times[name] = Samples.of(answer[name] for answer in answers)
    times["ttft_sec"] = Samples.of(
        answer["preprocess_sec"] + answer["vision_sec"] + answer["prefill_sec"] for answer in answers
    )
    times["decode_tokens_per_sec"] = Samples.of((answer_tokens - 1) / answer["decode_sec"] for answer in answers)
    memory = {"load": {kind: Samples.of([value]) for kind, value in load["memory"]["load"].items()}}
    for stage, kinds in answers[0]["memory"].items():
        memory[stage] = {kind: Samples.of(answer["memory"][stage][kind] for answer in answers) for kind in kinds}
    last = answers[-1]
    return BundleRun(
        bundle=str(bundle.folder),
        identity=bundle.identity,
        tiles=last["tiles"],
        image_tokens=last["image_tokens"],
        prompt_tokens=last["prompt_tokens"],
        cached_share=load["cached_share"],
        times=times,
        memory=memory,
        notes=(*_split(bundle.identity), *last["notes"]),
    )


def _identity(folder: Path, manifest: Manifest, options: RunOptions) -> Identity:
    backend = choose_backend(folder, manifest, options.providers, "onnx", 0, options.device_id)
    assert backend.vision_providers is not None, "vision is measured in ONNX Runtime"
    vision = tuple(map(provider_name, backend.vision_providers))
    known = (manifest.name, manifest.target, manifest.weights, manifest.budget)
    if manifest.format == "bnb":
        return Identity(*known, (provider_name(backend.provider),), vision)
    return Identity(*known, vision)


def _split(identity: Identity) -> list[str]:
    """A note where torch and ONNX Runtime ran on different processors, as they do where one is a build for the CPU."""
    language, vision = identity.providers[0], (identity.vision_providers or identity.providers)[0]
    return [] if vision == language else [f"the language model ran on {language}, vision on {vision}"]


def _check_memory(bundles: Sequence[PlannedBundle], size: tuple[int, int], options: RunOptions) -> None:
    """All bundles on one provider are loaded at once; the prompt's few tokens are not counted."""
    for provider in {bundle.identity.providers[0] for bundle in bundles}:
        needs = [
            memory_need(
                bundle.folder,
                bundle.manifest,
                token_count(size, bundle.manifest.model, bundle.manifest.budget) + options.answer_tokens,
            )
            for bundle in bundles
            if bundle.identity.providers[0] == provider
        ]
        check_memory(needs, available_memory_bytes(on_device(provider, options.device_id)))


def _command(bundle: PlannedBundle, plan: RunPlan) -> list[str]:
    options = ["--threads", str(plan.settings.threads), "--metered", bundle.identity.providers[0]]
    if plan.settings.release_memory is not None:
        options.append("--release-memory" if plan.settings.release_memory else "--keep-memory")
    if plan.providers is not None:
        options += ["--providers", *plan.providers]
    if plan.device_id is not None:
        options += ["--device-id", str(plan.device_id)]
    return [sys.executable, "-m", "vz_edge.profiling.measure", str(bundle.folder), *options]


def _key(number: int, bundle: PlannedBundle) -> str:
    """Names a worker: the same bundle may be given twice, to see how far two equal ones lie apart."""
    return f"{bundle.folder.name} ({number + 1})"


def _round_name(number: int) -> str:
    return f"run {number}," if number else "warm-up,"
