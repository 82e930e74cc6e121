"""Every example runs, with the embedded model, and says what is in the picture."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vz_edge import EdgeModel

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURE = EXAMPLES / "scene.jpg"  # a teal and a black circle above, a blue star and no circle below
BELOW = (0, 400, 897, 769)
GENAI_HOME = os.environ.get("ORT_GENAI_HOME", "")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the command line would run it, in this process: it does not load everything anew."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    example(name).main()


def test_pick_names_what_is_there(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    objects = ["red triangle", "black circle", "gray rectangle"]
    run("pick.py", demo_bundle, PICTURE, *objects, monkeypatch=monkeypatch)
    picked = json.loads(capsys.readouterr().out)
    assert picked["object"] == "black circle" and set(picked["probabilities"]) == set(objects)
    run("pick.py", demo_bundle, PICTURE, "red triangle", monkeypatch=monkeypatch)
    assert json.loads(capsys.readouterr().out)["object"] is None


def test_watch_raises_an_event_when_the_answer_changes(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = Image.open(PICTURE)
    for number, circle_is_there in enumerate([False, True, True, False]):
        (scene if circle_is_there else scene.crop(BELOW)).save(tmp_path / f"{number}.png")
    (tmp_path / "2b.png").write_bytes(b"no picture")
    run("watch_camera.py", demo_bundle, tmp_path, "is there a black circle?", monkeypatch=monkeypatch)
    printed = capsys.readouterr()
    found = [json.loads(line) for line in printed.out.splitlines()]
    expected = [("begins", "1.png"), ("ends", "3.png")]
    assert [(event["event"], event["frame"]) for event in found] == expected
    assert "frame 2b.png was not answered" in printed.err


def test_ten_questions_are_answered_right(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("ten_questions.py", demo_bundle, PICTURE, monkeypatch=monkeypatch)
    first, *lines, _ = capsys.readouterr().out.splitlines()
    assert first.endswith("320 tokens")
    answers = [line.split("? ")[1] for line in lines]
    assert answers == ["3", "2", "circle", "blue", "yes", "no", "yes", "yes", "yes", "no"]


class TestCpp:
    QUESTION = "what shape is the teal object?"

    def test_what_is_prepared_is_what_stock_genai_takes(self, demo_bundle: Path) -> None:
        og: Any = pytest.importorskip("onnxruntime_genai")
        inputs, genai = og.NamedTensors(), og.Model(str(demo_bundle))
        model = EdgeModel.load(demo_bundle, threads=2)
        prepared = example("cpp/prepare.py").inputs_of(model, str(PICTURE), self.QUESTION)
        for name, array in prepared.items():
            inputs[name] = og.Tensor(array)
        parameters = og.GeneratorParams(genai)
        parameters.set_search_options(max_length=prepared["input_ids"].size + 8)
        generator = og.Generator(genai, parameters)
        generator.set_inputs(inputs)
        tokens = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        assert tokens == list(model.ask(PICTURE, self.QUESTION, max_new_tokens=8).token_ids)

    @pytest.mark.skipif(
        not (Path(GENAI_HOME) / "include" / "ort_genai.h").is_file() or not shutil.which("cmake"),
        reason="needs cmake, and ORT_GENAI_HOME with a release of ONNX Runtime GenAI: include/ and lib/",
    )
    def test_it_compiles_and_answers(self, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        build, inputs = tmp_path / "build", tmp_path / "inputs"
        configure = ["cmake", "-S", EXAMPLES / "cpp", "-B", build, f"-DORT_GENAI_HOME={GENAI_HOME}"]
        subprocess.run(configure, check=True, capture_output=True)
        subprocess.run(["cmake", "--build", build], check=True, capture_output=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(Path(GENAI_HOME) / "lib")}

        def ask() -> subprocess.CompletedProcess[str]:
            command = [build / "ask", demo_bundle, inputs, "8"]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

        run("cpp/prepare.py", demo_bundle, PICTURE, self.QUESTION, inputs, monkeypatch=monkeypatch)
        done = ask()
        assert (done.returncode, done.stdout.strip()) == (0, "circle"), done.stderr
        np.save(inputs / "input_ids.npy", np.zeros((1, 3), np.float64))
        done = ask()
        assert done.returncode == 1 and "float32, int32 or int64" in done.stderr
