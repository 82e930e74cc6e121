"""Bundles with bitsandbytes weights, from the command line to the answer."""

from __future__ import annotations

import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.cli.test_cli import vz_edge
from tests.tiny import make_checkpoint
from vz_edge.backends import transformers_backend
from vz_edge.bundle import read_manifest, write_manifest
from vz_edge.device.memory_check import memory_need
from vz_edge.device.model import EdgeModel
from vz_edge.device.process import Outcome
from vz_edge.device.runtime import CPU
from vz_edge.device.verify import look_again
from vz_edge.errors import CorruptBundleError, DependencyError, ExportError, RequestError, VzEdgeError
from vz_edge.host import parity
from vz_edge.host.export import ExportRequest, SilentProgress, plan_export, resolve_weights, write_bundle
from vz_edge.host.parity_picture import look
from vz_edge.planning.memory import bundle_bytes
from vz_edge.profiling.run_report import read_report

pytest.importorskip("bitsandbytes")
PICTURE = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
QUESTIONS = ["What is this?", "What is to the left?"]
FILES = {
    "chat_template.jinja",
    "embedding.data",
    "language_model/config.json",
    "language_model/generation_config.json",
    "language_model/model-00001-of-00001.safetensors",
    "language_model/model.safetensors.index.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vision.onnx",
    "vision.onnx.data",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and its bundles ``bnb4`` (by the command line, for the CPU), ``bnb8`` (for CUDA)."""
    folder = tmp_path_factory.mktemp("bnb")
    checkpoint = folder / "checkpoint"
    make_checkpoint(checkpoint, family="llava_next", decoder="mistral")
    options = ("--format", "bnb", "--tokens", "90", "--out", folder / "bnb4")
    done = vz_edge("export", "--model", checkpoint, *options)
    assert done.returncode == 0, done.stderr
    assert "4-bit weights of bitsandbytes for cpu" in done.stdout and "2 of 2 layers" in done.stdout
    request = ExportRequest(str(checkpoint), folder / "bnb8", format="bnb", bits=8, target="cuda", tokens="90")
    write_bundle(plan_export(request), SilentProgress())
    return folder


@pytest.fixture(scope="module", params=["bnb4", "bnb8"])
def bundle(request: pytest.FixtureRequest, folder: Path) -> Path:
    return folder / request.param


def test_the_bundle_holds_what_the_manifest_says(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.files.keys() == FILES
    assert manifest.format == "bnb" and manifest.weights.lm_head_bits == manifest.weights.vision_bits == 16
    decoder = manifest.parity.decoder
    assert decoder is not None and decoder.layers == 2
    assert 0 < decoder.relative_error < (0.3 if manifest.weights.bits == 4 else 0.03)
    need = memory_need(bundle, manifest, context_tokens=0)
    assert need.decoder_bytes > manifest.files["language_model/model-00001-of-00001.safetensors"].size_bytes


def test_sizes_are_predicted(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    predicted = bundle_bytes(manifest.model, manifest.weights, manifest.target)
    index = json.loads((bundle / "language_model" / "model.safetensors.index.json").read_text())
    assert predicted["embedding"] == manifest.files["embedding.data"].size_bytes
    # Tables of a kilobyte a layer, which all of NF4's layers have, weigh at this width.
    tables = 14 * 1400 if manifest.weights.bits == 4 else 0
    assert predicted["decoder"] + predicted["lm_head"] + tables == pytest.approx(
        index["metadata"]["total_size"], rel=0.01
    )


def test_questions_are_answered_in_every_way_alike(bundle: Path) -> None:
    model = EdgeModel.load(bundle)
    separate = [model.ask(PICTURE, question, max_new_tokens=6) for question in QUESTIONS]
    assert separate[0].image_tokens == 90 and separate[0].answer_tokens > 1
    stream = model.stream(PICTURE, QUESTIONS[0], max_new_tokens=6)
    assert "".join(stream) == separate[0].text and stream.reply.token_ids == separate[0].token_ids
    again = model.ask_many(PICTURE, [QUESTIONS[0]] * 2, max_new_tokens=6)
    assert again[0].token_ids == again[1].token_ids
    assert look_again(model).agrees(model.manifest.target)
    assert model.decoder.cache_bytes_per_token == model.manifest.predicted["kv_cache_bytes_per_token"]


def test_it_is_measured_with_what_loading_chooses(folder: Path, tmp_path: Path) -> None:
    options = ("--runs", 1, "--answer-tokens", 2, "--threads", 1, "--json", tmp_path / "report.json")
    done = vz_edge("profile", folder / "bnb4", *options)
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "report.json")
    (run,) = report.bundles
    assert (run.identity.providers, run.identity.vision_providers, run.notes) == ((CPU,), (CPU,), ())
    assert {"torch", "transformers", "bitsandbytes"} <= report.environment.versions.keys()
    done = vz_edge("profile", folder / "bnb4", *options, "--provider", "dml")
    assert done.returncode == 2 and "the language model cannot run on 'dml'" in done.stderr


def test_vision_in_torch_sees_what_onnxruntime_sees(bundle: Path) -> None:
    model, in_torch = EdgeModel.load(bundle), EdgeModel.load(bundle, vision="torch")
    assert look_again(in_torch).agrees(in_torch.manifest.target)
    found, expected = in_torch.encode(PICTURE), model.encode(PICTURE)
    assert found.kept is not None and expected.kept is not None
    assert np.mean(found.kept == expected.kept) == 1.0
    assert np.abs(found.features - expected.features).max() < 0.02 * np.abs(expected.features).max()
    replies = [each.ask(expected, QUESTIONS[0], max_new_tokens=4).token_ids for each in (model, in_torch)]
    assert replies[0] == replies[1]
    ran = vz_edge("run", bundle, "what?", "--vision", "torch", "--max-new-tokens", 2)
    assert ran.returncode == 0 and ran.stderr.count("\n") == 1, ran.stderr


def test_vision_in_torch_needs_no_onnxruntime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r"onnxruntime is not installed.*vision='torch' \(--vision torch\)"):
        EdgeModel.load(folder / "bnb4")
    assert EdgeModel.load(folder / "bnb4", vision="torch").ask(PICTURE, "what?", max_new_tokens=2).image_tokens == 90
    with pytest.raises(RequestError, match="vision 'jax' is unknown; expected 'onnx' or 'torch'"):
        EdgeModel.load(folder / "bnb4", vision="jax")  # type: ignore[arg-type]


def test_a_processor_that_torch_has_not_is_named_before_onnxruntimes(folder: Path) -> None:
    for provider, said in (("cuda", r"no CUDA device here; .*--provider cpu"), ("dml", "torch runs it; take")):
        done = vz_edge("run", folder / "bnb4", "what?", "--provider", provider)
        assert done.returncode == 2 and re.search(rf"cannot run on '{provider}': .*{said}", done.stderr), done.stderr


@pytest.mark.parametrize("reason", ["named symbol not found", "the process ended with status 1"])
def test_a_kernel_that_does_not_run_here_is_named_on_the_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(transformers_backend, "kernel_trial", lambda bits, device: Outcome(None, reason))
    never = ("--out", folder / "never")
    for arguments in (
        ("run", folder / "bnb4", "what?"),
        ("verify", folder / "bnb4"),
        ("export", "--model", folder / "checkpoint", "--format", "bnb", *never),
    ):
        done = vz_edge(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"4-bit kernel on this machine's cpu ({reason})" in done.stderr and "--format onnx" in done.stderr
    assert not (folder / "never").exists()


def test_threads_share_a_model(folder: Path) -> None:
    model = EdgeModel.load(folder / "bnb4")  # fresh: bitsandbytes rearranges its weights at the first call
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda question: model.ask(None, question, max_new_tokens=4).token_ids, QUESTIONS * 4))
    assert found == [model.ask(None, question, max_new_tokens=4).token_ids for question in QUESTIONS] * 4


def test_verify_inspect_and_run_take_it(bundle: Path) -> None:
    verified = vz_edge("verify", bundle)
    assert verified.returncode == 0, verified.stderr
    assert "every hash is as recorded" in verified.stdout and "the same next token" in verified.stdout
    inspected = vz_edge("inspect", bundle)
    assert inspected.returncode == 0 and "language_model/config.json" in inspected.stdout
    ran = vz_edge("run", bundle, "what?", "--max-new-tokens", 2)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("\n") == 1, ran.stderr  # the timings, and no library's chatter


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 16}, r"no 16 bits: .*--format onnx"),
        ({"lm_head_bits": 8}, "--lm-head-bits 8 does not apply to --format bnb"),
        ({"vision_bits": 8}, "--vision-bits 8 does not apply"),
        ({"block_size": 128}, "--block-size 128 does not apply"),
        ({"quantizer": "hqq"}, "--quantizer hqq does not apply"),
    ],
    ids=str,
)
def test_options_that_bitsandbytes_has_not_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ExportError, match=said):
        resolve_weights(ExportRequest("any", format="bnb", **options))
    assert resolve_weights(ExportRequest("any", format="bnb", lm_head_bits=16)).quantizer == "nf4"


def test_without_bitsandbytes_neither_side_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_backend, "PACKAGES", ("torch", "no_such_package"))
    request = ExportRequest(str(folder / "checkpoint"), folder / "never", format="bnb")
    with pytest.raises(DependencyError, match=r"exporting with --format bnb needs no_such_package.*'bitsandbytes>="):
        plan_export(request)
    with pytest.raises(DependencyError, match=r"bnb4 has bitsandbytes weights.*'bitsandbytes>=.*--format onnx"):
        EdgeModel.load(folder / "bnb4")
    assert not (folder / "never").exists()


def test_a_checkpoint_without_a_tensor_is_corrupt(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bnb4", tmp_path / "bundle")
    file = tmp_path / "bundle" / "language_model" / "model-00001-of-00001.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}
    save_file(tensors, file, metadata={"format": "pt"})
    write_manifest(tmp_path / "bundle", read_manifest(folder / "bnb4"), lambda *_: None)
    with pytest.raises(CorruptBundleError, match=r"lm_head\.weight"):
        EdgeModel.load(tmp_path / "bundle")


def test_an_export_that_disagrees_with_torch_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = parity.reference.decoder_states
    monkeypatch.setattr(parity.reference, "decoder_states", lambda *args: -honest(*args))
    request = ExportRequest(str(folder / "checkpoint"), tmp_path / "bundle", format="bnb", tokens="all")
    with pytest.raises(VzEdgeError, match="the decoder differs from torch"):
        write_bundle(plan_export(request), SilentProgress())
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_layers_of_a_large_decoder_are_compared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "WHOLE_DECODER_ELEMENTS", 0)
    monkeypatch.setattr(parity, "FIRST_LAYERS", 1)
    manifest = read_manifest(folder / "bnb4")
    checkpoint = plan_export(ExportRequest(str(folder / "checkpoint"), tmp_path / "never")).checkpoint
    expected = look(checkpoint, manifest.model, manifest.image, manifest.budgets)
    record = parity.check_parity(folder / "bnb4", manifest, checkpoint, expected).decoder
    assert record is not None and (record.layers, record.output, record.top_token) == (1, "residual", None)
    assert 0 < record.relative_error < 0.3
