"""What ``benchmarks.gpu`` found, written down: its own table, and one with the paper and the prediction beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.configurations import ANSWER_TOKENS, PROMPT_TOKENS, WEIGHTS, Configuration
from benchmarks.make_checkpoint import model_of_shape
from benchmarks.report import GB, Bar, Cell, Report, Samples
from vz_edge.bundle import bitsandbytes_weights, default_weights
from vz_edge.errors import DeviceError
from vz_edge.planning.devices import DeviceProfile, device_names, load_device
from vz_edge.planning.predict import Prediction, predict

Found = Mapping[Configuration, Mapping[str, Any]]
MIB = 2**20
NONE = "–"

SMALL_VANILLA = Configuration("7B", 16, "transformers", None)
SMALL_REDUCED = Configuration("7B", 16, "compress", 160)
LARGE_REDUCED = Configuration("13B", 4, "compress", 320)
MOST_PEAK_GB, LEAST_PREFILL_SPEEDUP, LEAST_FIRST_TOKEN_SPEEDUP = 9.5, 8.0, 1.0
BARS = 4

# VisionZip (arXiv 2412.04467) on one A800. Memory: its table of quantised weights, LLaVA-NeXT on ScienceQA, which
# nvidia-smi shows in MiB. Prefill: its table of efficiency, LLaVA-NeXT 7B on POPE.
PAPER_MEMORY_MB = {
    ("7B", 16, None): 18952,
    ("13B", 16, None): 36721,
    ("13B", 16, 320): 28810,
    ("13B", 8, 320): 16632,
    ("13B", 4, 320): 10176,
}
# Cards that share a profile's name and are slower than it.
OTHER_CARDS = ("NVIDIA H100 PCIe",)
PAPER_PREFILL_SEC = {("7B", 16, None): 0.218, ("7B", 16, 160): 0.0278}


def write_reports(
    found: Found,
    device_name: str,
    profile: DeviceProfile | None,
    shapes: Mapping[str, str],
    busy_percent: float,
    settings: dict[str, str | int | float],
    folder: Path,
) -> None:
    """Write ``gpu_<device>`` and ``gpu_<device>_beside``, and every number as ``gpu_<device>_measured.json``.

    ``shapes`` are those that the models had (make_checkpoint.py): only the published ones are held against bars.
    """
    name = f"gpu_{re.sub('[^a-z0-9]+', '-', device_name.lower().removeprefix('nvidia '))}"
    published = set(shapes.values()) == {"llava-next-7b", "llava-next-13b"}
    what = "random models of the true shapes" if published else f"random models of the shape '{shapes['13B']}'"
    settings = settings | {"device": device_name} | {f"shape of {model}": shape for model, shape in shapes.items()}
    reached = bars(found) if published else []
    missing = ["Not every bar could be measured."] if published and len(reached) < BARS else []
    folder.mkdir(parents=True, exist_ok=True)
    measured = [one._asdict() | dict(result) for one, result in found.items()]
    encoded = json.dumps({"device": device_name, "settings": settings, "measured": measured}, indent=1)
    (folder / f"{name}_measured.json").write_text(encoded + "\n", encoding="utf-8")
    Report(
        name=name,
        title=f"LLaVA-NeXT in transformers on {device_name}, {what}",
        busy_percent=busy_percent,
        notes=_notes(found) + missing,
        rows=_rows([row(*one) for one in found.items()]),
        bars=reached,
        settings=settings,
    ).write(folder)
    selected = [one for one in found if one.way != "published"]
    if selected:
        predicted, note = predictions(selected, profile, shapes)
        Report(
            name=f"{name}_beside",
            title=f"The same beside the paper's A800 and the prediction, {device_name}, {what}",
            busy_percent=busy_percent,
            notes=[note, *BESIDE_NOTES],
            rows=[beside(found, one, predicted.get(one)) for one in selected],
            settings=settings,
        ).write(folder)


def row(one: Configuration, result: Mapping[str, Any]) -> dict[str, Cell]:
    """A row of the first table."""
    cells: dict[str, Cell] = {
        "model": one.model,
        "weights": WEIGHTS[one.bits],
        "way": one.way,
        "tokens": str(one.tokens or "all"),
    }
    if "failure" in result:
        return cells | {"failed": result["failure"]}
    graph = result.get("graph_prefill_sec")
    return cells | {
        "image tokens": str(result["image_tokens"]),
        **{f"{stage}, GB": _memory(result["memory"][stage]) for stage in ("load", "vision", "prefill", "decode")},
        "vision": _ms(result["vision_sec"]),
        "prefill": _ms(result["prefill_sec"]),
        "prefill as a CUDA graph": _ms(graph) if graph else NONE,
        "first token": _ms(result["ttft_sec"]),
        "decode": Samples(tuple(1 / sec for sec in result["decode_sec"]), "tokens/s"),
    }


def beside(found: Found, one: Configuration, predicted: Prediction | None) -> dict[str, Cell]:
    """A row of the second table."""
    key, result = (one.model, one.bits, one.tokens), found[one]
    published = found.get(one._replace(way="published"), {"failure": "not measured"})
    measured = "failure" not in result
    memory, prefill = PAPER_MEMORY_MB.get(key), PAPER_PREFILL_SEC.get(key)
    return {
        "model": one.model,
        "weights": WEIGHTS[one.bits],
        "tokens": str(one.tokens or "all"),
        "peak, MiB": f"{peak_bytes(result) / MIB:.0f}" if measured else NONE,
        "peak, published way": NONE if "failure" in published else f"{peak_bytes(published) / MIB:.0f}",
        "peak, paper": f"{memory} MB" if memory else NONE,
        "peak, predicted": f"{predicted.memory.peak_bytes / MIB:.0f}" if predicted else NONE,
        "prefill": _median_ms(result["prefill_sec"]) if measured else NONE,
        "prefill, paper": _median_ms([prefill]) if prefill else NONE,
        "prefill, predicted": _median_ms([predicted.prefill_sec]) if predicted else NONE,
        "first token": _median_ms(result["ttft_sec"]) if measured else NONE,
        "first token, predicted": _median_ms([predicted.vision_sec + predicted.prefill_sec]) if predicted else NONE,
        "decode": str(_rate(result["decode_sec"])) if measured else NONE,
        "decode, predicted": str(_rate([predicted.decode_sec_per_token])) if predicted else NONE,
    }


def bars(found: Found) -> list[Bar]:
    """Those of which both sides were measured."""
    good = {one: result for one, result in found.items() if "failure" not in result}
    reached = []
    if LARGE_REDUCED in good:
        peak = peak_bytes(good[LARGE_REDUCED]) / GB
        reached.append(Bar("13B, 4-bit, 320 tokens: peak memory of the card", peak, "<=", MOST_PEAK_GB, "GB"))

    def compare(what: str, slow: Configuration, fast: Configuration, stage: str, least: float) -> None:
        if all(one in good and good[one].get(stage) for one in (slow, fast)):
            ratio = Samples(good[slow][stage], "s").median / Samples(good[fast][stage], "s").median
            reached.append(Bar(what, ratio, ">=", least, "x"))

    prefill = "7B, bf16, prefill: all tokens / 160"
    compare(prefill, SMALL_VANILLA, SMALL_REDUCED, "prefill_sec", LEAST_PREFILL_SPEEDUP)
    compare(f"{prefill}, both as CUDA graphs", SMALL_VANILLA, SMALL_REDUCED, "graph_prefill_sec", LEAST_PREFILL_SPEEDUP)
    what = "first token: 7B, bf16, all tokens / 13B, 4-bit, 320"
    compare(what, SMALL_VANILLA, LARGE_REDUCED, "ttft_sec", LEAST_FIRST_TOKEN_SPEEDUP)
    return reached


def predictions(
    selected: Sequence[Configuration], profile: DeviceProfile | None, shapes: Mapping[str, str]
) -> tuple[dict[Configuration, Prediction], str]:
    """What was predicted for ``profile``, and a note about it."""
    if profile is None:
        return {}, "No prediction: there is no profile of this device; name one with --profile."
    try:
        predicted = {
            one: predict(
                model_of_shape(shapes[one.model]),
                default_weights(16) if one.bits == 16 else bitsandbytes_weights(one.bits),  # type: ignore[arg-type]
                one.tokens,
                None,
                profile,
                "transformers",
                PROMPT_TOKENS,
                ANSWER_TOKENS,
            )
            for one in selected
        }
    except DeviceError as error:
        return {}, f"No prediction: {error}."
    return (
        predicted,
        f"Predicted: `vz_edge.planning.predict` with the profile {profile.name}, transformers as runtime.",
    )


def profile_of(device_name: str) -> DeviceProfile | None:
    """The shipped profile of the card that torch calls ``device_name``; None where there is none.

    Profiles are called after the card, then its memory where that is not clear: "NVIDIA A800-SXM4-80GB" is a800-80.
    """
    if device_name in OTHER_CARDS:
        return None
    words = device_name.lower().replace("-", " ").split()
    card = [word for word in words if word not in ("nvidia", "geforce", "pcie") and not word.startswith("sxm")]
    card = [word for word in card if not word.endswith("gb") and not word.startswith("hbm")]
    for name in device_names():
        parts = name.split("-")
        if card in (parts, parts[:-1]):
            return load_device(name)
    return None


def peak_bytes(result: Mapping[str, Any]) -> int:
    """The highest memory of the card from loading to the end of the answer."""
    return max(result["memory"][stage]["peak_bytes"] for stage in ("load", "vision", "prefill", "decode"))


BESIDE_NOTES = (
    "Memory is the highest of the card, context included, as nvidia-smi shows it in MiB. The paper's figures are of "
    "one A800, LLaVA 1.2, transformers 4.37 and ScienceQA's longer prompts (memory) or POPE (prefill); what is "
    "predicted is that code, which returns the attention of all the tower's layers, and not vz_edge.compress.",
    "The paper's prefill gains 7.8x from 2880 to 160 tokens; a picture that fills a 2 x 2 grid has 2928 here, 48 of "
    "them newlines.",
    "The published way is measured with 320 tokens alone: eager attention in all the tower's layers, kept.",
)


def _notes(found: Found) -> list[str]:
    notes = [
        f"A picture of 2 x 2 tiles and a base tile, {PROMPT_TOKENS} text tokens, {ANSWER_TOKENS} tokens of answer, "
        "greedy; fused attention (sdpa) but in the tower of the published way. Reading and cutting a picture on the "
        "processor is in no figure.",
        "Memory of each stage: torch's tensors / the whole card, context included, both at their highest. On a "
        "processor: VmHWM.",
        "Times are medians after two runs that are not counted, taken with CUDA events, launches by Python included. "
        "As a CUDA graph: the same prefill recorded once and replayed, without these.",
        "Random activations have few outliers, so LLM.int8() splits off fewer columns than it does in a real model.",
    ]
    starts = [result["memory"]["start"]["peak_bytes"] for result in found.values() if "memory" in result]
    if starts:
        notes.append(f"Before a model was made, {min(starts) / GB:.2f} to {max(starts) / GB:.2f} GB were taken.")
    failures = {one: result["graph_failure"] for one, result in found.items() if "graph_failure" in result}
    notes += [f"No CUDA graph of {' '.join(map(str, one))}: {reason}" for one, reason in failures.items()]
    return notes


def _rows(rows: list[dict[str, Cell]]) -> list[dict[str, Cell]]:
    """The rows with all columns each, ``failed`` the last of them and only where something did."""
    columns = list(dict.fromkeys(column for cells in rows for column in cells if column != "failed"))
    columns += ["failed"] if any("failed" in cells for cells in rows) else []
    return [{column: cells.get(column, NONE) for column in columns} for cells in rows]


def _memory(reading: Mapping[str, int]) -> str:
    kinds = [reading[kind] for kind in ("allocated_bytes", "peak_bytes") if kind in reading]
    return " / ".join(f"{size / GB:.2f}" for size in kinds)


def _ms(seconds: list[float]) -> Samples:
    return Samples(tuple(1000 * sec for sec in seconds), "ms")


def _median_ms(seconds: list[float]) -> str:
    return str(Samples((_ms(seconds).median,), "ms"))


def _rate(seconds: list[float]) -> Samples:
    return Samples((1 / Samples(tuple(seconds), "s").median,), "tokens/s")
