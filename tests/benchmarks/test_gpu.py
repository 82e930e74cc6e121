"""``benchmarks.gpu`` on the processor with a tiny model: what it would do on a GPU, but for CUDA's own measurements."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import __main__, jobs
from benchmarks.gpu.configurations import ANSWER_TOKENS, SHAPES, Configuration, Job, configurations
from benchmarks.gpu.report import BARS, bars, profile_of, write_reports
from benchmarks.gpu.worker import Subject, measure
from benchmarks.make_checkpoint import model_of_shape
from benchmarks.random_model import random_model

WAYS = [("compress", 160), ("transformers", None), ("compress", 321), ("published", 320)]
TOKENS = {160: 160, None: 2928, 320: 320}
MISSING = ("onnxruntime", "onnx", "onnx_ir", "onnxscript")


def result(peak_bytes: int, prefill_sec: float, ttft_sec: float) -> dict:
    stages = {stage: {"allocated_bytes": 1, "peak_bytes": 1} for stage in ("start", "load", "vision", "prefill")}
    return {
        "image_tokens": 320,
        "memory": stages | {"decode": {"allocated_bytes": 1, "peak_bytes": peak_bytes}},
        "vision_sec": [ttft_sec - prefill_sec],
        "prefill_sec": [prefill_sec],
        "ttft_sec": [ttft_sec],
        "decode_sec": [0.5],
    }


FOUND = {
    Configuration("7B", 16, "transformers", None): result(20_000_000_000, 0.8, 1.0),
    Configuration("7B", 16, "compress", 160): result(16_000_000_000, 0.1, 0.2) | {"graph_failure": "no such luck"},
    Configuration("13B", 4, "compress", 320): result(9_000_000_000, 0.3, 0.5),
    Configuration("13B", 16, "transformers", None): {"failure": "CUDA out of memory"},
}


def test_every_way_is_measured_and_one_that_fails_says_so():
    found = {(line["way"], line["tokens"]): line for line in measure(Job("cpu", "tiny", 16, WAYS, runs=1))}
    assert list(found) == WAYS
    assert "321" in found.pop(("compress", 321))["failure"]
    for (_, tokens), line in found.items():
        assert "failure" not in line, line["failure"]
        assert line["image_tokens"] == TOKENS[tokens]
        assert len(line["ttft_sec"]) == 1
        assert len(line["decode_sec"]) == ANSWER_TOKENS - 1
        assert line["memory"].keys() == {"start", "making", "load", "vision", "prefill", "decode"}


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_weights_are_measured(bits):
    pytest.importorskip("bitsandbytes")
    (line,) = measure(Job("cpu", "tiny", bits, [("compress", 160)], runs=1))
    assert "failure" not in line, line["failure"]
    assert line["image_tokens"] == 160


@torch.inference_mode()
def test_the_published_way_gives_the_features_of_compress():
    subject = Subject.random(Job("cpu", "tiny", 16, [], runs=1))
    subject.model.float()
    with subject.features("compress", 320) as features:
        compressed = features()
    with subject.features("published", 320) as features:
        published = features()
    torch.testing.assert_close(published, compressed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("bits", "kind"), [(8, "Linear8bitLt"), (4, "Linear4bit")])
def test_only_the_decoders_layers_are_quantised(bits, kind):
    pytest.importorskip("bitsandbytes")
    model = random_model(model_of_shape("tiny"), bits, "cpu")
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == kind}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantised == {name for name in linear if name.startswith("model.language_model.layers.")}
    assert len(quantised) == 7 * model_of_shape("tiny").decoder.layers
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_command_writes_the_reports_without_onnx(tmp_path):
    for name in MISSING:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is hidden')")
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--shape", "small", "--runs", "1"]
    command += ["--only", "7B", "bf16", "320", "--profile", "h200"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OUT": str(tmp_path / "out")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("gpu_cpu.json", "gpu_cpu.md", "gpu_cpu_beside.json", "gpu_cpu_beside.md", "gpu_cpu_measured.json")
    }
    data = json.loads((tmp_path / "out/gpu_cpu.json").read_text())
    assert [row["way"] for row in data["rows"]] == ["compress", "published"]
    assert "failed" not in data["rows"][0]
    assert data["bars"] == [] and data["command"].startswith("python -m benchmarks.gpu --device cpu")
    assert "profile h200" in (tmp_path / "out/gpu_cpu_beside.md").read_text()


def test_what_was_not_reached_in_time_is_a_row(monkeypatch):
    chosen = configurations(["13B", "4-bit"])
    found = jobs.measure(chosen, "cpu", "small", 1, limit_sec=0.0)
    assert list(found) == chosen
    assert all("not reached" in result["failure"] for result in found.values())


def test_bars_and_failures_are_written_down(tmp_path):
    write_reports(FOUND, "NVIDIA H200", profile_of("NVIDIA H200"), SHAPES["full"], 0.0, {}, tmp_path)
    text = (tmp_path / "gpu_h200.md").read_text()
    assert "| CUDA out of memory |" in text
    assert "no such luck" in text
    assert "Not every bar could be measured." in text
    beside = (tmp_path / "gpu_h200_beside.md").read_text()
    assert "10176 MB" in beside
    assert "27.8 ms" in beside
    measured = json.loads((tmp_path / "gpu_h200_measured.json").read_text())["measured"]
    assert [one["model"] for one in measured] == ["7B", "7B", "13B", "13B"]


def test_bars_hold_what_was_measured_against_the_limits():
    peak, prefill, first_token = bars(FOUND)
    assert (peak.value, peak.met) == (9.0, True)
    assert (prefill.value, prefill.met) == (pytest.approx(8.0), True)
    assert (first_token.value, first_token.met) == (2.0, True)
    small, *_ = FOUND
    assert bars({small: FOUND[small]}) == []
    with_graphs = {one: found | {"graph_prefill_sec": found.get("prefill_sec")} for one, found in FOUND.items()}
    assert len(bars(with_graphs)) == BARS


def test_words_of_one_kind_are_alternatives_and_kinds_restrict_each_other():
    assert len(configurations([])) == 30
    assert configurations(["13B", "4-bit", "320", "all"]) == [
        Configuration("13B", 4, "compress", 320),
        Configuration("13B", 4, "transformers", None),
        Configuration("13B", 4, "published", 320),
    ]
    assert configurations(["published", "160"]) == []


@pytest.mark.parametrize(
    ("device_name", "profile"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A800-SXM4-80GB", "a800-80"),
        ("NVIDIA A800 80GB PCIe", "a800-80"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090-24"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx-4060-ti-16"),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("NVIDIA H100 PCIe", None),
        ("Orin", None),
        ("cpu", "cpu"),
    ],
)
def test_a_cards_name_finds_its_profile(device_name, profile):
    found = profile_of(device_name)
    assert (found and found.name) == profile


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_says_what_to_do():
    with pytest.raises(SystemExit, match="--device cpu --shape small") as error:
        __main__.require_device("cuda")
    assert "\n" not in str(error.value)
