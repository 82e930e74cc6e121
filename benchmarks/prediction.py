"""Predicted beside measured: vz-demo and 1B-, 7B- and 13B-shaped models at 4 bits, on this processor or a GPU.

    python -m benchmarks.cpu_profile         # first: the profile that the predictions come from
    python -m benchmarks.prediction
    python -m benchmarks.prediction --device agx-orin-64      # on that board, with bundles for CUDA

Every bundle answers a question about a picture of five tiles in 16 tokens, as ``vz-edge profile`` measures it, next to
what ``vz-edge plan`` predicts for the device. Bundles that fit into memory together are measured in
interleaved rounds; the 13B at 320 tokens and the 7B with all of them always are, because the ratio of their times to
first token is the claim of the project. On a processor llama.cpp reads and writes as many tokens with the same shape.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import bundles
from benchmarks.llama_cpp_model import write_gguf
from benchmarks.make_checkpoint import model_of_shape
from benchmarks.report import GB, REPORTS, Bar, Cell, Report, Samples
from vz_edge.errors import VzEdgeError
from vz_edge.host.export import ExportRequest, SilentProgress, plan_export, write_bundle
from vz_edge.planning.devices import DeviceProfile, load_device
from vz_edge.profiling.beside import with_predictions
from vz_edge.profiling.environment import busy_percent
from vz_edge.profiling.processes import interleave, workers
from vz_edge.profiling.run import RunOptions, measure, plan_run
from vz_edge.profiling.run_report import BundleRun

DEMO, SMALL, MIDDLE, LARGE = bundles.DEMO, "1b", "llava-next-7b", "llava-next-13b"
PAIR = ((LARGE, "320"), (MIDDLE, "all"))
GROUPS = (
    tuple((DEMO, tokens) for tokens in ("all", "640", "320", "160")),
    tuple((SMALL, tokens) for tokens in ("all", "640", "320", "160")),
    tuple((MIDDLE, tokens) for tokens in ("640", "320", "160")),
    PAIR,
    ((LARGE, "640"),),
    ((LARGE, "160"),),
    ((LARGE, "all"),),
)
BARRED = tuple((shape, tokens) for shape in (SMALL, MIDDLE, LARGE) for tokens in ("320", "640"))
DEMO_RUNS = 9  # of the embedded model, which answers in a fraction of a second
SLOWEST, SLOWEST_RUNS = (LARGE, "all"), 1  # five minutes an answer on two cores
ANSWER_TOKENS, RIVAL_PROMPT_TOKENS = 16, 390  # 390: 320 image tokens and this question
TIME_LIMIT, MEMORY_LIMIT, LEAST_SPEED_UP = 0.20, 0.10, 2.5
Key = tuple[str, str]


def bundle_of(shape: str, tokens: str, target: bundles.Target, work: Path) -> Path:
    """The bundle of that shape and budget, made if it is not there."""
    if shape != DEMO:
        same = tokens == "320"
        return bundles.bundle(shape, target, work) if same else bundles.bundle_with_tokens(shape, target, work, tokens)
    folder = work / f"{DEMO}-{tokens}"
    request = ExportRequest(DEMO, folder, bits=4, tokens=tokens, target=target, force=True)
    write_bundle(plan_export(request), SilentProgress())
    return folder


def measured_groups(
    work: Path, runs: int, threads: int, shapes: list[str], device: DeviceProfile, target: bundles.Target
) -> Iterator[tuple[Key, BundleRun | VzEdgeError]]:
    """Every bundle's measurement with its prediction, or why there is none: it is then the group's."""
    for group in GROUPS:
        if not {shape for shape, _ in group} <= set(shapes):
            continue
        folders = [bundle_of(shape, tokens, target, work) for shape, tokens in group]
        rounds = {DEMO: max(runs, DEMO_RUNS)}.get(group[0][0], SLOWEST_RUNS if SLOWEST in group else runs)
        try:
            # What is predicted of memory is the least that a bundle needs.
            options = RunOptions(runs=rounds, answer_tokens=ANSWER_TOKENS, threads=threads, release_memory=True)
            plan = plan_run(folders, options)
            report = with_predictions(measure(plan, lambda what: print(what, flush=True)), plan, device)
        except VzEdgeError as error:
            print(error, flush=True)
            yield from ((key, error) for key in group)
        else:
            yield from zip(group, report.bundles, strict=True)


def llama_cpp(shape: str, work: Path, threads: int, runs: int) -> list[dict]:
    """llama.cpp's seconds for as many tokens as a 320-token question has."""
    gguf = work / f"{shape}-q4_0.gguf"
    write_gguf(gguf, model_of_shape(shape).decoder)
    command = [sys.executable, "-m", "benchmarks.llama_cpp_model", "--threads", str(threads), str(gguf)]
    request = {"prompt_tokens": RIVAL_PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS - 1}
    with workers({"llama.cpp": command}, threads) as rivals:
        answers = interleave(rivals, request, runs)["llama.cpp"]
    gguf.unlink()
    return answers


COLUMNS = ("model", "tokens", "image + prompt", "vision", "prefill", "first token", "decode", "peak memory", "failed")
EMPTY: dict[str, Cell] = dict.fromkeys(COLUMNS, "–")


def row(key: Key, run: BundleRun | VzEdgeError) -> dict[str, Cell]:
    """Measured, and in brackets predicted / measured."""
    name = {"model": key[0], "tokens": key[1]}
    if isinstance(run, VzEdgeError):
        return {**EMPTY, **name, "failed": str(run)}
    assert run.predicted is not None
    times, predicted = run.times, run.predicted

    def beside(name: str, unit: str, scale: float = 1.0) -> str:
        value = times[name].median
        return f"{Samples((value * scale,), unit)} ({predicted.times[name] / value:.2f})"

    peak = run.peak_bytes
    return {
        **EMPTY,
        **name,
        "image + prompt": f"{run.image_tokens} + {run.prompt_tokens}",
        "vision": beside("vision_sec", "s"),
        "prefill": beside("prefill_sec", "s"),
        "first token": beside("ttft_sec", "s"),
        "decode": beside("decode_tokens_per_sec", "tokens/s"),
        "peak memory": f"{Samples((peak / GB,), 'GB')} ({predicted.peak_bytes / peak:.2f})",
    }


def bars(found: dict[Key, BundleRun]) -> list[Bar]:
    """Farthest predictions among the barred models, and the claim; none where one of them failed."""
    if not {*BARRED, *PAIR} <= set(found):
        return []
    barred = [run for key, run in found.items() if key in BARRED and run.predicted is not None]
    limits = []
    for what, name in (("prefill", "prefill_sec"), ("decode", "decode_tokens_per_sec")):
        errors = [abs(run.predicted.times[name] / run.times[name].median - 1) for run in barred]  # type: ignore[union-attr]
        limits.append(Bar(f"{what}, farthest prediction", 100 * max(errors), "<=", 100 * TIME_LIMIT, "% off"))
    errors = [abs(run.predicted.peak_bytes / run.peak_bytes - 1) for run in barred]  # type: ignore[union-attr]
    limits.append(Bar("peak memory, farthest prediction", 100 * max(errors), "<=", 100 * MEMORY_LIMIT, "% off"))
    large, middle = (found[key].times["ttft_sec"].median for key in PAIR)
    limits.append(Bar("first token, 7B with all tokens / 13B at 320", middle / large, ">=", LEAST_SPEED_UP, "x"))
    return limits


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2, help="after a warm-up")
    parser.add_argument("--shapes", nargs="+", default=[DEMO, SMALL, MIDDLE, LARGE])
    parser.add_argument("--device", default="cpu", help="the profile of this machine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--reports", type=Path, default=REPORTS)
    arguments = parser.parse_args()
    device = load_device(arguments.device)
    target: bundles.Target = "cpu" if device.device_class == "cpu" else "cuda"
    work, runs, threads, shapes = arguments.work, arguments.runs, arguments.threads, arguments.shapes
    busy = busy_percent()
    found = dict(measured_groups(work, runs, threads, shapes, device, target))
    rivals = {}
    for shape in shapes:
        if shape != DEMO and target == "cpu":
            rivals[shape] = llama_cpp(shape, work, threads, runs)
    rows = [row(key, run) for key, run in found.items()]
    measured = {key: run for key, run in found.items() if isinstance(run, BundleRun)}
    for shape, answers in rivals.items():
        prefill = Samples(tuple(answer["prefill_sec"] for answer in answers), "s")
        decode = Samples(tuple((ANSWER_TOKENS - 1) / answer["decode_sec"] for answer in answers), "tokens/s")
        text = {"model": f"{shape}, llama.cpp Q4_0", "image + prompt": str(RIVAL_PROMPT_TOKENS)}
        rows.append({**EMPTY, **text, "prefill": prefill, "decode": decode})
    Report(
        name="prediction" if device.name == "cpu" else f"prediction_{device.name}",
        title=f"Predicted and measured on {device.title}: 4 bits, a picture of five tiles, an answer of 16 tokens",
        busy_percent=busy,
        notes=[
            f"Measured medians; in brackets predicted / measured, with the profile {device.name}.",
            "Random weights of the true shapes; the lm_head has 8 bits. Peak memory is VmHWM over all stages.",
            f"The 13B with all tokens was measured {SLOWEST_RUNS} time(s) after the warm-up: minutes an answer.",
            "llama.cpp: text tokens alone, as many as image and prompt have at 320; no picture is encoded.",
        ],
        rows=rows,
        bars=bars(measured) if target == "cpu" else (),
        settings={"threads": threads, "runs": runs, "answer_tokens": ANSWER_TOKENS},
    ).write(arguments.reports)
    for tokens in ("all", "640", "160"):
        for shape in shapes:
            shutil.rmtree(work / f"{shape}-{target}-{tokens}", ignore_errors=True)


if __name__ == "__main__":
    main()
