"""Stage "headline": LLaVA-NeXT-13B at 4 bits and 320 tokens beside the 7B, on one card. Time and memory only.

Memory first: each bundle alone on the card, in a process that ends before the next one starts, so that the whole
card's figure is this bundle's. Then time: all of them loaded, each in a process of its own with a CUDA graph, answering
in turn, with the graph and without.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.gpu.rivals import LARGE, RIVALS, SMALL_ALL, SMALL_REDUCED, SMALL_VANILLA, Rival, make_all
from benchmarks.gpu.stage import Record, Settings
from benchmarks.report import GB, Bar, Cell, Samples
from vz_edge.errors import MeasurementError
from vz_edge.planning.cost import decode_work
from vz_edge.planning.devices import DeviceProfile
from vz_edge.planning.memory import ACTIVATION_BYTES, bundle_bytes
from vz_edge.profiling.processes import Worker

ANSWER_TOKENS = {"true": 64, "tiny": 8}
ROUNDS = {"true": 7, "tiny": 1}
WARM_UPS = {"true": 2, "tiny": 1}  # the first captures the graph
RESERVE_SEC = 12.0  # of the stage's time: no round begins with less left
MOST_PEAK_GB, MOST_TTFT_RATIO, LEAST_PREFILL_RATIO, LEAST_BANDWIDTH_PERCENT = 8.9, 0.5, 8.0, 60.0
MEMORY, TIME = "memory of the card at its highest", "time, medians (lowest–highest)"
STAGES = ("picture", "prefill", "decode")


def run(settings: Settings, record: Record) -> None:
    """Make the bundles, then measure memory, then time."""
    started = time.monotonic()
    make_all(RIVALS, settings)
    record.measured("make_sec", round(time.monotonic() - started, 1))
    record.note(f"The bundles were made in {time.monotonic() - started:.0f} s (random_bundle.py).")
    found: dict[str, dict[str, Any]] = {}
    for rival in RIVALS:
        found[rival.name] = _memory(rival, settings, record)
        record.measured("rivals", found)
    _times(settings, found, record)
    record.measured("rivals", found)
    for rival in RIVALS:
        record.row(TIME, time_row(rival, found[rival.name]))
    profile = this_card()
    record.note(f"The card's bandwidth is {profile.name}'s." if profile else "There is no profile of this card.")
    if settings.shape == "true" and settings.device == "cuda":
        for bar in bars(found, settings, profile):
            record.bar(bar)
    record.line(line(found))
    if not any("memory" in one or "without_graph" in one for one in found.values()):
        raise MeasurementError(f"no model was measured: {found[LARGE.name]['memory_failure']}")


def this_card() -> DeviceProfile | None:
    """The profile of the card that NVML names first."""
    from benchmarks.gpu.report import profile_of
    from vz_edge.device.nvml import gpu_names

    names = gpu_names()
    return profile_of(names[0]) if names else None


def _worker(rival: Rival, settings: Settings, graph_tokens: int) -> Worker:
    command = [sys.executable, "-m", "benchmarks.gpu.answering", str(rival.folder(settings))]
    command += [json.dumps(asdict(settings)), "--answer-tokens", str(ANSWER_TOKENS[settings.shape])]
    return Worker([*command, "--graph-tokens", str(graph_tokens)], threads=1)


def _memory(rival: Rival, settings: Settings, record: Record) -> dict[str, Any]:
    """Alone on the card, without a graph: memory by stage, and how many tokens there were."""
    try:
        worker = _worker(rival, settings, 0)
        try:
            memory = worker.ask({"what": "load"})["memory"]
            first, second = (worker.ask({"what": "memory"}) for _ in range(2))
        finally:
            worker.close()
    except MeasurementError as error:
        record.row(MEMORY, {"model": rival.name, "failed": str(error)})
        return {"memory_failure": str(error)}
    for stage in STAGES:  # the arena keeps what it took: the second answer's figure is no smaller
        both = first["memory"][stage], second["memory"][stage]
        memory[stage] = {kind: max(reading.get(kind, 0) for reading in both) for kind in both[0]}
    kind = next(kind for kind in ("card_bytes", "process_bytes", "peak_rss_bytes") if kind in memory["load"])
    cells: dict[str, Cell] = {"model": rival.name, "figure": kind}
    cells |= {stage: f"{memory[stage].get(kind, 0) / GB:.2f} GB" for stage in ("start", "load", *STAGES)}
    cells["process"] = f"{peak_bytes(memory, 'process_bytes') / GB:.2f} GB"
    record.row(MEMORY, cells)
    return {
        "memory": memory,
        "kind": kind,
        **{name: second[name] for name in ("tiles", "image_tokens", "prompt_tokens")},
    }


def peak_bytes(memory: dict[str, dict[str, int]], kind: str) -> int:
    """The highest of all stages, from loading to the end of the answer."""
    return max(memory[stage].get(kind, 0) for stage in ("load", *STAGES))


def _times(settings: Settings, found: dict[str, dict[str, Any]], record: Record) -> None:
    """Add ``with_graph`` and ``without_graph``, each a list of rounds, to what was found of each rival."""
    workers: dict[str, Worker] = {}
    has_graph: dict[str, bool] = {}
    try:
        for rival in RIVALS:
            counts = found[rival.name]
            if "image_tokens" in counts:
                tokens = counts["image_tokens"] + counts["prompt_tokens"] + ANSWER_TOKENS[settings.shape]
                workers[rival.name], has_graph[rival.name] = _started(rival, settings, tokens, record)
        warm_ups, rounds = WARM_UPS[settings.shape], ROUNDS[settings.shape]
        for number in range(warm_ups + rounds):
            if settings.left_sec < RESERVE_SEC:
                record.note(f"{max(number - warm_ups, 0)} of {rounds} rounds: the time was over.")
                break
            for name in list(workers):
                ways = (True, False) if has_graph[name] else (False,)
                for graph in ways:
                    _round(workers, name, graph, number >= warm_ups, found[name], record)
    finally:
        for worker in workers.values():
            worker.close()


def _started(rival: Rival, settings: Settings, tokens: int, record: Record) -> tuple[Worker, bool]:
    """A loaded worker, with a CUDA graph if that can be had."""
    try:
        return _worker(rival, settings, tokens), True
    except MeasurementError as error:
        record.note(f"{rival.name} does not load with a CUDA graph: {error}")
        return _worker(rival, settings, 0), False


def _round(
    workers: dict[str, Worker], name: str, graph: bool, kept: bool, found: dict[str, Any], record: Record
) -> None:
    """Ask a worker once; one that ends is left out from then on."""
    way = "with_graph" if graph else "without_graph"
    try:
        answered = workers[name].ask({"what": "round", "graph": graph})
    except MeasurementError as error:
        found.setdefault("time_failure", f"{way.replace('_', ' ')}: {error}")
        record.note(f"{name}, {way.replace('_', ' ')}: {error}")
        workers.pop(name).close()
        return
    if kept:
        found.setdefault(way, []).append(answered)


def samples(rounds: Sequence[dict[str, Any]], name: str) -> Samples:
    """Milliseconds of a stage; ``ttft_sec`` is all that is before the first token."""
    parts = ("preprocess_sec", "vision_sec", "prefill_sec") if name == "ttft_sec" else (name,)
    return Samples(tuple(1000 * sum(one[part] for part in parts) for one in rounds), "ms")


def decode_rate(rounds: Sequence[dict[str, Any]]) -> Samples:
    """Tokens a second. Prefill gave the first token of the answer."""
    return Samples(tuple((one["answer_tokens"] - 1) / one["decode_sec"] for one in rounds), "tokens/s")


def time_row(rival: Rival, found: dict[str, Any]) -> dict[str, Cell]:
    """A row of the second table."""
    cells: dict[str, Cell] = {"model": rival.name}
    rounds = found.get("without_graph", [])
    if not rounds:
        return cells | {"failed": found.get("time_failure") or found.get("memory_failure") or "no round was measured"}
    cells["image + prompt"] = f"{found['image_tokens']} + {found['prompt_tokens']}"
    for column, name in (("preprocess", "preprocess_sec"), ("vision", "vision_sec"), ("prefill", "prefill_sec")):
        cells[column] = samples(rounds, name)
    cells |= {"first token": samples(rounds, "ttft_sec"), "decode": decode_rate(rounds)}
    graph = found.get("with_graph")
    cells["decode, CUDA graph"] = decode_rate(graph) if graph else "–"
    return cells | ({"failed": found["time_failure"]} if "time_failure" in found else {})


def bars(found: dict[str, dict[str, Any]], settings: Settings, profile: DeviceProfile | None) -> list[Bar]:
    """Those of which everything was measured."""
    reached = []
    large, vanilla = found[LARGE.name], found[SMALL_VANILLA.name]
    if large.get("memory"):
        peak = peak_bytes(large["memory"], large["kind"]) / GB
        reached.append(Bar(f"{LARGE.name}: memory of the card", peak, "<=", MOST_PEAK_GB, "GB"))
    if large.get("without_graph") and vanilla.get("without_graph"):
        for what, name in (("first token", "ttft_sec"), ("vision and prefill alone", "")):
            one, other = (
                samples(of["without_graph"], name).median
                if name
                else sum(samples(of["without_graph"], part).median for part in ("vision_sec", "prefill_sec"))
                for of in (large, vanilla)
            )
            reached.append(Bar(f"{what}: {LARGE.name} / {SMALL_VANILLA.name}", one / other, "<=", MOST_TTFT_RATIO, "x"))
    few, all_tokens = found[SMALL_REDUCED.name].get("without_graph"), found[SMALL_ALL.name].get("without_graph")
    if few and all_tokens:
        ratio = samples(all_tokens, "prefill_sec").median / samples(few, "prefill_sec").median
        reached.append(Bar(f"prefill: {SMALL_ALL.name} / {SMALL_REDUCED.name}", ratio, ">=", LEAST_PREFILL_RATIO, "x"))
    if profile and large.get("with_graph"):
        percent = 100 * bandwidth_share(LARGE, large, settings, profile)
        what = f"{LARGE.name}: decode by a CUDA graph, share of the memory bandwidth"
        reached.append(Bar(what, percent, ">=", LEAST_BANDWIDTH_PERCENT, "%"))
    return reached


def bandwidth_share(rival: Rival, found: dict[str, Any], settings: Settings, profile: DeviceProfile) -> float:
    """What a step by the graph must read, over what the card could read in its time."""
    decoder = rival.model(settings).decoder
    parts = bundle_bytes(rival.model(settings), rival.weights, "cuda")
    middle = found["image_tokens"] + found["prompt_tokens"] + ANSWER_TOKENS[settings.shape] / 2
    work = decode_work(decoder, middle, parts["decoder"] + parts["lm_head"], ACTIVATION_BYTES["cuda"])
    per_sec: float = decode_rate(found["with_graph"]).median
    return work.bytes_moved * per_sec / profile.bandwidth_bytes_per_sec.value


def line(found: dict[str, dict[str, Any]]) -> str:
    """13B at 320 tokens in a line."""
    large = found[LARGE.name]
    words = [LARGE.name]
    if large.get("memory"):
        words.append(f"{peak_bytes(large['memory'], large['kind']) / GB:.2f} GB")
    if large.get("without_graph"):
        words.append(f"first token {samples(large['without_graph'], 'ttft_sec')}")
        words.append(f"decode {decode_rate(large['without_graph'])}")
    if large.get("with_graph"):
        words.append(f"by a CUDA graph {decode_rate(large['with_graph'])}")
    return "; ".join(words)
