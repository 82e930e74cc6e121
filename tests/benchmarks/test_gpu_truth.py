"""``benchmarks.gpu.truth`` rehearsed: every stage on the processor with tiny models, and the ways a stage can fail.

What CUDA alone can show is not tested: it takes a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.gpu import truth
from benchmarks.gpu.efficiencies import Timed, solve, with_figures, yaml_lines
from benchmarks.gpu.random_bundle import make_bundle
from benchmarks.gpu.rivals import RIVALS, SMALL_ALL, SMALL_REDUCED, SMALL_VANILLA
from benchmarks.gpu.stage import Record, Settings, Stage, run_stage
from benchmarks.gpu.stages import headline, operators
from benchmarks.make_checkpoint import model_of_shape
from benchmarks.report import Bar
from vz_edge import EdgeModel
from vz_edge.bundle import default_weights, verify_files
from vz_edge.device.verify import parity_picture
from vz_edge.planning.devices import load_device
from vz_edge.planning.memory import bundle_bytes
from vz_edge.planning.predict import predict
from vz_edge.planning.question import question_of
from vz_edge.planning.roofline import load_runtime

REPOSITORY = Path(__file__).parents[2]
TINY = Settings("cpu", "tiny", "", "")
STAGE_CODE = """
import os, signal, subprocess, sys, time
def run(settings, record):
    record.row("numbers", {"a": "1"})
    record.line("so far")
    %s
"""


# --- the list


def test_the_whole_list_runs_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.truth", "--shape", "tiny", "--device", "cpu", "--minutes", "20"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    files = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert done.returncode == 0, {name: (found["why"], found["log"]) for name, found in files.items() if found["why"]}
    assert set(files) == {f"{stage.name}.json" for stage in truth.STAGES}
    assert len(list((tmp_path / "out").iterdir())) <= 8, "so many files come back from a machine that is lent"
    text = (tmp_path / "out" / "truth.md").read_text()
    for stage in truth.STAGES:
        assert f"| {stage.name} | done |" in text and f"## {stage.title}" in text
    for found in (
        "13B-4bit-320",
        "MatMulNBits",
        "profiles/runtimes/onnxruntime.yaml",
        "compress",
        "blocks of 32 symmetric fused",
    ):
        assert found in text
    assert not any(row.get("failed") for found in files.values() for table in found["tables"] for row in table["rows"])


# --- a stage


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "out").mkdir()
    return Settings("cpu", "tiny", str(tmp_path / "out"), str(tmp_path / "work"))


def stage_of(body: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    """A stage with that body, as a module beside the real ones."""
    import benchmarks.gpu.stages

    extra = tmp_path / "stages"
    extra.mkdir(exist_ok=True)
    (extra / "made.py").write_text(STAGE_CODE % body)
    # The stage's process is another one: it finds the module by this hook of Python's start.
    (tmp_path / "sitecustomize.py").write_text(
        f"import benchmarks.gpu.stages as stages\nstages.__path__.append({str(extra)!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
    assert benchmarks.gpu.stages
    return Stage("made", "Made for a test", 60)


def test_a_stage_is_killed_with_its_children_and_leaves_what_it_had(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "alive"
    child = f"import time\\nwhile True: open({str(mark)!r}, 'w').write('x'); time.sleep(0.05)"
    stage = stage_of(f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)", monkeypatch, tmp_path)
    found = run_stage(stage, settings, 8.0)
    assert (found["state"], found["why"]) == ("out of time", "killed after 8 s")
    assert found["tables"] == [{"title": "numbers", "rows": [{"a": "1"}]}] and found["line"] == "so far"
    mark.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not mark.exists(), "a process that the stage started lives on"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise MemoryError('CUDA failure 2: out of memory')", "MemoryError: CUDA failure 2: out of memory"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("os._exit(3)", "ended with status 3"),
        ("raise SystemExit(2)", "SystemExit: 2"),
    ],
    ids=["out of memory", "killed", "native exit", "exit"],
)
def test_a_stage_that_fails_says_why(
    body: str, why: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = run_stage(stage_of(body, monkeypatch, tmp_path), settings, 60)
    assert found["state"] == "failed" and why in found["why"]
    assert found["tables"], "what it had measured is kept"


def test_stages_share_the_time_and_the_last_may_not_begin(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = []

    def run(stage: Stage, settings: Settings, box_sec: float) -> dict:
        boxes.append(box_sec)
        time.sleep(0.5)
        return {"state": "failed", "why": "a|b"}

    monkeypatch.setattr(truth, "run_stage", run)
    monkeypatch.setattr(truth, "LEAST_BOX_SEC", 0.3)
    stages = (Stage("one", "One", 0.2), Stage("two", "Two", 60), Stage("three", "Three", 60))
    found = truth.run(stages, settings, minutes=1.2 / 60)
    assert boxes[0] == 0.2 and boxes[1] < 0.8
    assert found["three"]["why"] == "not begun: the 0.02 minutes were over"
    text = Path(settings.out, truth.OVERVIEW).read_text()
    assert "| one | failed: a/b |" in text and "| three | out of time: not begun" in text


def test_a_provider_that_is_missing_is_a_row_that_says_so(settings: Settings) -> None:
    """No CUDA in this process's onnxruntime, or no driver: the stage fails, and has a row for each operator."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA may start here")
    found = run_stage(truth.STAGES[0], replace(settings, device="cuda"), 120)
    assert found["state"] == "failed" and "7 of 7 operators" in found["why"]
    rows = next(table["rows"] for table in found["tables"] if table["title"] == "operators against numpy")
    assert len(rows) == 7 and all("CUDAExecutionProvider" in row["failed"] for row in rows)


def test_without_its_measurements_the_plan_says_what_to_run(settings: Settings) -> None:
    found = run_stage(truth.STAGES[3], settings, 60)
    assert found["state"] == "failed" and "run the stage 'headline' first" in found["why"]


def test_nonsense_on_the_command_line_is_refused(tmp_path: Path) -> None:
    for wrong in (["--only", "everything"], ["--minutes", "0"], ["--minutes", "-1"], ["--device", "tpu"]):
        command = [sys.executable, "-m", "benchmarks.gpu.truth", "--out", str(tmp_path), *wrong]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 2 and wrong[1] in done.stderr and "Traceback" not in done.stderr


def test_a_record_is_on_disk_after_every_change(tmp_path: Path) -> None:
    record = Record(tmp_path / "x.json")
    record.row("t", {"a": "1"})
    record.bar(Bar("b", 2.0, "<=", 1.0, "GB"))
    record.note("n")
    record.note("n")
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["state"] == "failed" and found["notes"] == ["n"] and found["bars"][0]["met"] is False
    record.end("done")
    assert json.loads((tmp_path / "x.json").read_text())["state"] == "done"


# --- random bundles


@pytest.mark.parametrize(("bits", "tokens"), [(4, "320"), (16, "all")])
def test_a_random_bundle_is_what_an_export_would_be(bits: int, tokens: str, tmp_path: Path) -> None:
    weights = default_weights(bits)  # type: ignore[arg-type]
    manifest = make_bundle("tiny", tmp_path / "bundle", weights, tokens, "cpu")
    predicted = bundle_bytes(model_of_shape("tiny"), weights, "cpu")
    # One graph of the exporter: its weights are the bytes that an export would write, and lie over one another here.
    assert manifest.predicted["decoder_bytes"] == pytest.approx(predicted["decoder"] + predicted["lm_head"], rel=0.02)
    assert manifest.predicted["vision_bytes"] == pytest.approx(predicted["vision"], rel=0.02)
    verify_files(tmp_path / "bundle", manifest, lambda *_: None)
    model = EdgeModel.load(tmp_path / "bundle")
    seen = model.encode(parity_picture())
    assert len(seen.features) > 100 and abs(seen.features).max() < 100
    logits = model.decoder.start(64).append(model.embedding.rows(range(64)))
    assert logits.std() > 0.01 and abs(logits).max() < 1000, "neither vanished nor overflowed"


# --- efficiencies


def timed(rival, device, launches) -> Timed:
    """What would be measured if the plan were right."""
    model = model_of_shape("llava-next-13b" if rival.size == "13B" else "llava-next-7b")
    found = predict(model, rival.weights, rival.tokens, None, device, "onnxruntime", 73, 64)
    known = launches.efficiency(device.device_class)
    decoder = bundle_bytes(model, rival.weights, "cuda")
    read = decoder["decoder"] + decoder["lm_head"]
    context = found.question.prefill_tokens + found.question.answer_tokens / 2
    cache = 2 * context * model.decoder.layers * model.decoder.kv_heads * model.decoder.head_dim * 2
    bandwidth = device.bandwidth_bytes_per_sec.value * known.bandwidth_share.value
    token_sec = known.token_sec.value
    return Timed(
        model,
        rival.weights,
        question_of(model, rival.tokens, None, 73, 64),
        found.preprocess_sec,
        found.vision_sec,
        found.prefill_sec,
        found.decode_sec_per_token,
        token_sec,
        (read + cache) / bandwidth + token_sec,
    )


@pytest.mark.parametrize("name", ["h200", "h100-80"])
def test_what_the_plan_predicts_gives_its_own_efficiencies_back(name: str) -> None:
    device, runtime = load_device(name), load_runtime("onnxruntime")
    known = runtime.efficiency(device.device_class)
    measured = [timed(rival, device, runtime) for rival in (SMALL_VANILLA, SMALL_ALL, SMALL_REDUCED)]
    solved = solve(*measured, device, runtime.launches, known)
    expected = {
        "linear.16": known.linear["16"].share,
        "linear.4": known.linear["4"].share,
        "attention": known.attention.share,
        "bandwidth_share": known.bandwidth_share.value,
        "launch_sec": known.launch_sec.value,
        "token_sec": known.token_sec.value,
    }
    assert known.pixel_sec is not None
    assert solved.figures == pytest.approx(expected | {"pixel_sec": known.pixel_sec.value}, rel=1e-3)


def test_the_lines_to_paste_are_a_class_of_the_runtimes_file() -> None:
    device, runtime = load_device("h200"), load_runtime("onnxruntime")
    known = runtime.efficiency("datacentre")
    fast = [
        replace(timed(rival, device, runtime), prefill_sec=0.2) for rival in (SMALL_VANILLA, SMALL_ALL, SMALL_REDUCED)
    ]
    solved = solve(*fast, device, runtime.launches, known)
    written = yaml.safe_load(yaml_lines(solved, known, "a card"))
    assert set(written) == set(
        yaml.safe_load((REPOSITORY / "profiles/runtimes/onnxruntime.yaml").read_text())["classes"]["datacentre"]
    )
    assert written["linear"]["16"] | {"share": 0} == {"peak": "fp16_fp32acc", "share": 0, "source": "measured: a card"}
    assert written["linear"]["16"]["share"] == pytest.approx(solved.figures["linear.16"], rel=0.01)
    assert written["linear"]["8"]["source"] == known.linear["8"].source, "what was not measured stays"
    assert with_figures(known, solved).linear["16"].share == pytest.approx(min(solved.figures["linear.16"], 1))


def test_what_cannot_be_solved_is_said() -> None:
    device, runtime = load_device("h200"), load_runtime("onnxruntime")
    known = runtime.efficiency("datacentre")
    vanilla, every, few = (timed(rival, device, runtime) for rival in (SMALL_VANILLA, SMALL_ALL, SMALL_REDUCED))
    bound = (
        replace(vanilla, decode_graph_sec=None),
        replace(every, prefill_sec=1e-6),
        replace(few, decode_sec_per_token=few.token_sec),
    )
    solved = solve(*bound, device, runtime.launches, known)
    assert {"bandwidth_share", "linear.4", "launch_sec"}.isdisjoint(solved.figures)
    assert [note.split(":")[0] for note in solved.notes[:3]] == ["bandwidth_share", "linear.4", "launch_sec"]


# --- headline and operators


def rounds(preprocess: float, vision: float, prefill: float, decode: float) -> list[dict]:
    one = {"preprocess_sec": preprocess, "vision_sec": vision, "prefill_sec": prefill, "decode_sec": decode}
    return [one | {"answer_tokens": 65, "token_sec": 0.0}] * 3


def test_bars_hold_what_was_measured_against_the_limits() -> None:
    memory = {stage: {"card_bytes": 8_000_000_000} for stage in ("start", "load", "picture", "prefill", "decode")}
    memory["prefill"] = {"card_bytes": 9_000_000_000}
    counts = {"image_tokens": 320, "prompt_tokens": 73}
    found = {rival.name: dict(counts) for rival in RIVALS}
    found["13B-4bit-320"] |= {
        "memory": memory,
        "kind": "card_bytes",
        "without_graph": rounds(0.03, 0.02, 0.05, 1.0),
        "with_graph": rounds(0.03, 0.02, 0.05, 0.2),
    }
    found["7B-16bit-all"] |= {"without_graph": rounds(0.03, 0.02, 0.2, 1.0)}
    found["7B-4bit-160"] |= {"without_graph": rounds(0.03, 0.02, 0.02, 1.0)}
    found["7B-4bit-all"] |= {"without_graph": rounds(0.03, 0.02, 0.2, 1.0)}
    true = replace(TINY, shape="true", device="cuda")
    reached = headline.bars(found, true, load_device("h100-80"))
    assert [(round(bar.value, 2), bar.met) for bar in reached[:4]] == [
        (9.0, False),
        (0.4, True),
        (round(0.07 / 0.22, 2), True),
        (10.0, True),
    ]
    assert reached[4].value == pytest.approx(100 * 6.98e9 * 64 / 0.2 / 3.35e12, rel=0.05)
    assert headline.bars({rival.name: {} for rival in RIVALS}, true, None) == []


def test_a_profile_is_split_into_prefill_and_tokens() -> None:
    def event(category: str, name: str, ts: int, dur: int, op: str = "") -> dict:
        return {"cat": category, "name": name, "ts": ts, "dur": dur, "args": {"op_name": op}}

    runs = [event("Session", "model_run", start, 90) for start in (0, 100, 200, 300, 400)]
    nodes = [
        event("Node", "a_kernel_time", start + 5, 10 + start // 100, "MatMul") for start in (0, 100, 200, 300, 400)
    ]
    other = [event("Node", "a_fence_before", 210, 50, "MatMul"), event("Node", "b_kernel_time", 320, 3, "Add")]
    found = operators.split(runs + nodes + other)
    assert found["prefill"] == pytest.approx({"MatMul": 12e-6})
    assert found["decode"] == pytest.approx({"MatMul": 27e-6, "Add": 3e-6})
