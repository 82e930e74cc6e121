"""What a runtime reaches on a card, computed back from measured times: the shares of ``profiles/runtimes/*.yaml``.

The model of time is that of ``vz_edge.planning.roofline``; each figure is solved from the measurement that it decides:

``bandwidth_share``  decoding of 16-bit weights by a CUDA graph: nothing but bytes
``launch_sec``       decoding of 4-bit weights without one, where launches and not bytes bind it
``linear`` 16        prefill of all tokens with 16-bit weights; ``attention`` is taken to reach as much
``linear`` 4         prefill of all tokens with 4-bit weights, less the time to unpack them
``token_sec``        a token's loop outside of ONNX Runtime; ``pixel_sec``, preprocessing a pixel of a tile
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import yaml

from vz_edge.bundle import WeightSpec
from vz_edge.planning.cost import Work, decode_work, prefill_work, preprocess_pixels, unpacking_work, vision_work
from vz_edge.planning.devices import DeviceProfile
from vz_edge.planning.memory import ACTIVATION_BYTES, bundle_bytes
from vz_edge.planning.question import Question
from vz_edge.planning.roofline import Efficiency, Launches
from vz_edge.recipe import ModelSpec


@dataclass(frozen=True)
class Timed:
    """An answer that was measured: medians in seconds. ``decode_graph_sec`` is a token by a CUDA graph."""

    model: ModelSpec
    weights: WeightSpec
    question: Question
    preprocess_sec: float
    vision_sec: float
    prefill_sec: float
    decode_sec_per_token: float
    token_sec: float
    decode_graph_sec: float | None = None


@dataclass(frozen=True)
class Solved:
    """Figures by their place in the file ("linear.16", "bandwidth_share"...), and what could not be solved."""

    figures: Mapping[str, float]
    notes: tuple[str, ...]


def solve(
    vanilla: Timed, all_tokens: Timed, reduced: Timed, device: DeviceProfile, launches: Launches, known: Efficiency
) -> Solved:
    """The figures from the 7B at 16 bits, at 4 bits with all tokens, and at 4 bits with few.

    ``known`` gives what is needed and not measured.
    """
    figures: dict[str, float] = {
        "pixel_sec": vanilla.preprocess_sec / preprocess_pixels(vanilla.model, vanilla.question)
    }
    notes = []
    bandwidth, peak = device.bandwidth_bytes_per_sec.value, device.peak("fp16_fp32acc")
    figures["token_sec"] = reduced.token_sec
    if vanilla.decode_graph_sec is not None:
        read = _decode(vanilla).bytes_moved
        figures["bandwidth_share"] = read / (bandwidth * max(vanilla.decode_graph_sec - vanilla.token_sec, 1e-9))
    else:
        notes.append("bandwidth_share: decoding by a CUDA graph was not measured")
    share = figures.get("bandwidth_share", known.bandwidth_share.value)

    prefill = _prefill(vanilla)
    figures["linear.16"] = (prefill.linear_flops + prefill.attention_flops) / (peak * vanilla.prefill_sec)
    figures["attention"] = figures["linear.16"]

    packed = unpacking_work(_prefill(all_tokens), all_tokens.model.decoder)
    attention_sec = packed.attention_flops / (peak * figures["attention"])
    computing_sec = all_tokens.prefill_sec - packed.unpacked_bytes / (bandwidth * share) - attention_sec
    if computing_sec > 0:
        figures["linear.4"] = packed.linear_flops / (peak * computing_sec)
    else:
        notes.append("linear.4: unpacking and attention alone are predicted to take longer than the prefill took")

    decode, step_sec = _decode(reduced), reduced.decode_sec_per_token - reduced.token_sec
    if step_sec > 1.05 * decode.bytes_moved / (bandwidth * share):
        count = decode.layers * launches.decoder[str(reduced.weights.bits)]
        figures["launch_sec"] = step_sec / count
    else:
        notes.append("launch_sec: decoding is bound by bytes without a CUDA graph too")
    looked = vision_work(vanilla.model, vanilla.question, _bytes(vanilla)["vision"], ACTIVATION_BYTES["cuda"])
    looking = (looked.linear_flops + looked.attention_flops) / (peak * vanilla.vision_sec)
    notes.append(f"vision reaches {looking:.0%} of the tensor cores; the plan takes the share of linear.16 for it")
    above = [name for name, value in figures.items() if not name.endswith("_sec") and value > 1]
    notes += [f"{name} is above 1: the profile's peak, or the work that is counted, is wrong" for name in above]
    return Solved(figures, tuple(notes))


def yaml_lines(solved: Solved, known: Efficiency, source: str) -> str:
    """The class of the runtime's file with the measured figures in their places; the others stay as they are."""

    def figure(name: str, value: float, old_source: str) -> dict[str, object]:
        measured = solved.figures.get(name)
        if measured is None:
            return {"value": value, "source": old_source}
        return {"value": float(f"{measured:.3g}"), "source": f"measured: {source}"}

    def share(name: str, old: object) -> dict[str, object]:
        kept = {"peak": old.peak, "share": old.share, "source": old.source}  # type: ignore[attr-defined]
        measured = solved.figures.get(name)
        return kept if measured is None else kept | {"share": float(f"{measured:.3g}"), "source": f"measured: {source}"}

    content: dict[str, object] = {
        "linear": {bits: share(f"linear.{bits}", old) for bits, old in known.linear.items()},
        "attention": share("attention", known.attention),
    }
    for name in ("bandwidth_share", "launch_sec", "token_sec", "pixel_sec"):
        old = getattr(known, name)
        if old is not None:
            content[name] = figure(name, old.value, old.source)
    content["unpacked_bits"] = list(known.unpacked_bits)
    return yaml.safe_dump(content, sort_keys=False, width=1000)


def with_figures(known: Efficiency, solved: Solved) -> Efficiency:
    """``known`` with the measured figures, to predict with."""
    found = solved.figures
    linear = {
        bits: replace(share, share=min(found.get(f"linear.{bits}", share.share), 1.0))
        for bits, share in known.linear.items()
    }
    named = {
        name: replace(getattr(known, name), value=found[name])
        for name in ("bandwidth_share", "launch_sec", "token_sec", "pixel_sec")
        if name in found and getattr(known, name) is not None
    }
    attention = replace(known.attention, share=min(found.get("attention", known.attention.share), 1.0))
    return replace(known, linear=linear, attention=attention, **named)


def _bytes(timed: Timed) -> dict[str, int]:
    return bundle_bytes(timed.model, timed.weights, "cuda")


def _prefill(timed: Timed) -> Work:
    parts = _bytes(timed)
    weights = parts["decoder"] + parts["lm_head"]
    return prefill_work(timed.model.decoder, timed.question.prefill_tokens, weights, ACTIVATION_BYTES["cuda"])


def _decode(timed: Timed) -> Work:
    parts, question = _bytes(timed), timed.question
    middle = question.prefill_tokens + question.answer_tokens / 2
    return decode_work(timed.model.decoder, middle, parts["decoder"] + parts["lm_head"], ACTIVATION_BYTES["cuda"])
