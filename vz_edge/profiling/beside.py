"""The prediction beside the measurement: what a device's profile says of the bundles that were measured."""

from __future__ import annotations

import dataclasses

from vz_edge.device.runtime import CPU
from vz_edge.planning.devices import DeviceProfile
from vz_edge.planning.predict import predict
from vz_edge.profiling.run import PlannedBundle, RunPlan
from vz_edge.profiling.run_report import Predicted, RunReport

# The model's stages as they are measured; an answer's peak is in its prefill, whose workspace the arena then keeps.
MEASURED_STAGES = {"load": "load", "picture": "picture", "answer": "prefill"}


def with_predictions(report: RunReport, plan: RunPlan, device: DeviceProfile) -> RunReport:
    """The report with a prediction for each bundle, for the tiles and tokens that it was measured with."""
    runs = []
    for run, bundle in zip(report.bundles, plan.bundles, strict=True):
        predicted = predict_bundle(bundle, plan.settings.answer_tokens, device, run.tiles, run.prompt_tokens)
        runs.append(dataclasses.replace(run, predicted=predicted, notes=(*run.notes, *_mismatch(bundle, device))))
    return dataclasses.replace(report, bundles=tuple(runs))


def predict_bundle(
    bundle: PlannedBundle, answer_tokens: int, device: DeviceProfile, tiles: int | None = None, prompt_tokens: int = 0
) -> Predicted:
    """What ``device`` is predicted to do; ``tiles`` None: the most the model knows. Raises DeviceError, BudgetError."""
    manifest = bundle.manifest
    tokens = None if manifest.budget is None else manifest.budget.total(manifest.model.max_tiles)
    weights = manifest.weights
    found = predict(manifest.model, weights, tokens, tiles, device, "onnxruntime", prompt_tokens, answer_tokens)
    return Predicted(
        device.name,
        {
            "preprocess_sec": found.preprocess_sec,
            "vision_sec": found.vision_sec,
            "prefill_sec": found.prefill_sec,
            "ttft_sec": found.ttft_sec,
            "decode_tokens_per_sec": found.tokens_per_sec,
        },
        {MEASURED_STAGES[stage]: sum(parts.values()) for stage, parts in found.memory.stages.items()},
        found.memory.peak_bytes,
    )


def _mismatch(bundle: PlannedBundle, device: DeviceProfile) -> list[str]:
    on_cpu = bundle.identity.providers[0] == CPU
    if on_cpu == (device.device_class == "cpu"):
        return []
    return [f"measured on {'the CPU' if on_cpu else 'a GPU'}, predicted for {device.name}, which is another kind"]
