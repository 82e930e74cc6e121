"""One round of the process that is measured, and what is planned before it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.device import standin
from vz_edge.backends.transformers_backend import TransformersBackend
from vz_edge.bundle import StopSpec, read_manifest
from vz_edge.device.image import tile_count
from vz_edge.device.model import EdgeModel
from vz_edge.device.onnx_decoder import OnnxContext
from vz_edge.device.runtime import CPU, CUDA
from vz_edge.errors import ContextLengthError, InsufficientMemoryError, RequestError
from vz_edge.profiling import run
from vz_edge.profiling.measure import QUESTION, answer
from vz_edge.profiling.meter import MemoryMeter
from vz_edge.profiling.run import RunOptions, largest_picture, plan_run
from vz_edge.profiling.run_report import STAGES
from vz_edge.recipe import load_recipe, recipe_names

SIZE = (56, 56)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for which every token is a stop token."""
    folder = tmp_path_factory.mktemp("measure") / "bundle"
    standin.write_bundle(folder, stop=StopSpec(tuple(range(standin.VOCAB)), ()))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> EdgeModel:
    return EdgeModel.load(folder, threads=1)


def test_an_answer_has_the_tokens_asked_for_whatever_stops_it(
    model: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    append = OnnxContext.append
    monkeypatch.setattr(OnnxContext, "append", lambda self, embeds: steps.append(len(embeds)) or append(self, embeds))
    measured = answer(model, MemoryMeter(CPU), SIZE, answer_tokens=6)
    prefill = measured["prompt_tokens"] + measured["image_tokens"]
    assert steps == [prefill, 1, 1, 1, 1, 1]  # the first of the six tokens is prefill's
    assert list(measured["memory"]) == ["picture", "prefill", "decode"]
    assert measured["tiles"] == 5


def test_a_round_reads_what_run_reads(model: EdgeModel) -> None:
    measured = answer(model, MemoryMeter(CPU), SIZE, answer_tokens=2)
    reply = model.ask(np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8), QUESTION, max_new_tokens=2)
    assert (measured["prompt_tokens"], measured["image_tokens"]) == (reply.prompt_tokens, reply.image_tokens)


def test_an_answer_beyond_the_context_is_refused(model: EdgeModel) -> None:
    with pytest.raises(ContextLengthError, match=f"the context of {standin.CONTEXT}; lower --answer-tokens"):
        answer(model, MemoryMeter(CPU), SIZE, answer_tokens=standin.CONTEXT)


@pytest.mark.parametrize("name", recipe_names())
def test_the_default_picture_has_all_tiles(name: str) -> None:
    model = load_recipe(name).model
    assert tile_count(largest_picture([model]), model) == model.max_tiles


def test_the_default_picture_is_that_of_the_model_with_most_tiles() -> None:
    models = [load_recipe(name).model for name in ("llava-1.5-7b", "llava-next-7b")]
    assert largest_picture(models) == largest_picture(models[::-1]) == (672, 672)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RunOptions(runs=0), "--runs 0"),
        (RunOptions(answer_tokens=1), "--answer-tokens 1"),
        (RunOptions(threads=0), "--threads 0"),
    ],
)
def test_impossible_options(folder: Path, options: RunOptions, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan_run([folder], options)


def test_a_language_model_in_torch_is_measured_where_it_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, though ONNX Runtime is a build for the CPU: that is where ``EdgeModel.load`` runs it by default."""
    manifest = dataclasses.replace(read_manifest(folder), format="bnb", target="cuda")
    monkeypatch.setattr(run, "read_manifest", lambda folder: manifest)
    monkeypatch.setattr(run, "choose_backend", lambda *_: TransformersBackend("cuda", (CPU,)))
    asked: list[str] = []
    monkeypatch.setattr(run, "available_memory_bytes", asked.append)
    plan = plan_run([folder], RunOptions())
    (bundle,) = plan.bundles
    assert (bundle.identity.providers, bundle.identity.vision_providers) == ((CUDA,), (CPU,))
    assert asked == [CUDA]
    assert {"torch", "transformers"} <= plan.environment.versions.keys()
    command = run._command(bundle, plan)
    assert command[command.index("--metered") + 1] == CUDA and "--providers" not in command
    stages = {stage: {"peak_rss_bytes": 1} for stage in STAGES[1:]}
    times = dict.fromkeys(("preprocess_sec", "vision_sec", "prefill_sec", "decode_sec"), 1.0)
    told = {"tiles": 1, "image_tokens": 4, "prompt_tokens": 9, "notes": [], "memory": stages, **times}
    load = {"load_sec": 1.0, "cached_share": None, "memory": {"load": {"peak_rss_bytes": 1}}}
    assert run.bundle_run(bundle, load, [told], 2).notes == (f"the language model ran on {CUDA}, vision on {CPU}",)


def test_what_a_bundle_of_graphs_runs_on_is_known_and_torch_is_not_part_of_it(folder: Path) -> None:
    plan = plan_run([folder], RunOptions(providers=("cpu",)))
    (bundle,) = plan.bundles
    assert (bundle.identity.providers, bundle.identity.vision_providers) == ((CPU,), None)
    assert run._command(bundle, plan)[-2:] == ["--providers", "cpu"]
    assert "torch" not in plan.environment.versions


@pytest.mark.parametrize(("release", "option"), [(True, "--release-memory"), (False, "--keep-memory"), (None, None)])
def test_workers_give_memory_back_as_asked(folder: Path, release: bool | None, option: str | None) -> None:
    plan = plan_run([folder], RunOptions(release_memory=release))
    assert plan.settings.release_memory is release
    command = run._command(plan.bundles[0], plan)
    assert [word for word in command if word.endswith("-memory")] == ([option] if option else [])


def test_bundles_are_counted_together_before_any_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size_bytes = sum((folder / f"{graph}.onnx").stat().st_size for graph in ("vision", "decoder"))
    monkeypatch.setattr(run, "available_memory_bytes", lambda provider: size_bytes + 10)
    assert len(plan_run([folder], RunOptions()).bundles) == 1
    with pytest.raises(InsufficientMemoryError, match="one bundle at a time") as caught:
        plan_run([folder, folder], RunOptions())
    assert "\n" not in str(caught.value)
