"""What README and the documents show is tried: commands, Python, data, links.

The embedded model stands in for every other one: a folder is laid out in which ``llava-13b`` and ``bundles/vz-demo``
are its bundle and ``street.jpg`` is ``examples/scene.jpg``, and the blocks run there as they are written. What cannot
run stands in a table with the reason.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import vz_edge
from tests.documents import DOCUMENTS, REPOSITORY, Block, anchors, blocks, commands, links, table_rows, text_of
from vz_edge.recipe import load_recipe, recipe_names

LONGEST_SEC = 120
# Commands that are not run, by what they begin with, and why.
NOT_RUN = {
    "pip install": "needs a package index; .github/workflows/device.yml installs the wheel",
    "pip wheel": "tests/test_packaging.py builds the wheel",
    "make": "runs this test",
    "vz-edge export --model llava-next-13b": "downloads 26.7 GB from the hub; tests export vz-demo",
    "vz-edge serve": "runs until it is stopped; tests/serve starts servers",
    "vz-edge profile llava-13b llava-7b": "takes half a minute; tests/cli/test_profile.py measures two bundles",
    "vz-edge doctor": "its exit status is this machine's; tests/device/test_doctor.py",
    "openssl": "a program of the system",
    "curl": "asks a server on another machine",
    "python -m vz_edge.serve.ros2": "needs ROS 2; tests/serve/test_ros2.py drives the node",
    "ros2": "needs ROS 2",
    "cmake": "needs ONNX Runtime GenAI's headers; tests/test_examples.py compiles it where they are",
    "build-cpp/ask": "as above",
    "benchmarks/all.sh": "takes hours",
    "torchrun": "takes hours",
    "python training/evaluate.py": "takes minutes; tests/training evaluates a few pictures",
    "python -m benchmarks.demo_accuracy": "takes minutes",
}
# Python blocks that are not run, by something that they contain, and why.
PYTHON_NOT_RUN = {
    ">>> import re": "tests/test_demo.py runs them as doctests",
    "openai.OpenAI(": "needs a running server; tests/serve asks one by OpenAI's client",
    "create_app(engine": "tests/serve makes applications so",
    "BagSource(": "needs a bag; tests/watch reads some",
}
# What a block's text is changed to before it runs: (document, as written, as run).
CHANGED = [
    ("docs/sessions.md", 'system="Answer in one word.", ', ""),  # of which the embedded model's template knows nothing
    ("docs/streams.md", "model.watch(0, ", "model.watch(live(), "),  # there is no camera
    ("docs/streams.md", '"rtsp://camera/1"', "live()"),
    ("docs/streams.md", "deadline=0.4", "deadline=60"),  # nor time to waste on a busy machine
    ("README.md", "deadline=5)", "deadline=60)"),
    ("docs/transformers.md", '"llava-hf/llava-v1.6-vicuna-7b-hf"', repr(str(REPOSITORY / "export" / "vz-demo"))),
]
# Documents whose commands are not run, and why.
OF_OTHER_MACHINES = {"docs/jetson.md": "a board's, a container's and a GPU's"}
SHELL = [block for block in blocks("sh") if block.document not in OF_OTHER_MACHINES]
PYTHON = blocks("python")


def runnable(block: Block) -> list[str]:
    return [command for command in commands(block) if not command.startswith(tuple(NOT_RUN))]


def reason_against(block: Block) -> str | None:
    return next((reason for part, reason in PYTHON_NOT_RUN.items() if part in block.text), None)


@pytest.fixture(scope="module")
def desk(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the blocks run."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(REPOSITORY / "examples", folder / "examples", ignore=shutil.ignore_patterns("out", "__pycache__"))
    (folder / "bundles").mkdir()
    (folder / "bundles" / "vz-demo").symlink_to(demo_bundle)
    (folder / "llava-13b").symlink_to(demo_bundle)
    board = text_of("profiles/agx-orin-64.yaml").replace("name: agx-orin-64", "name: my-board")
    (folder / "my-board.yaml").write_text(board, encoding="utf-8")
    scene = folder / "examples" / "scene.jpg"
    shutil.copy(scene, folder / "street.jpg")
    (folder / "frames").mkdir()
    shutil.copy(scene, folder / "frames" / "0.jpg")
    Image.open(scene).crop((0, 400, 897, 769)).save(folder / "frames" / "1.jpg")
    return folder


def shell(script: str, folder: Path) -> str:
    """Run a script whose ``python`` and ``vz-edge`` are the tests' own, without input. Returns all that it printed."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "100",
        "DORA_ZENOH_MULTICAST": "off",  # nobody beyond this machine is looked for
    }
    running = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = running.communicate(timeout=LONGEST_SEC)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, f"{script}\n{printed}"
    return printed


# --- commands


@pytest.mark.parametrize("block", [block for block in SHELL if runnable(block)], ids=str)
def test_commands_run(block: Block, desk: Path) -> None:
    script = "\n".join(runnable(block))
    if "import dora" in script and not importlib.util.find_spec("dora"):
        pytest.skip("dora-rs is not installed (Python 3.11 or later)")
    printed = shell(script, desk)
    if "import dora" in script:
        shown = next(block.text for block in blocks("") if block.text.startswith("person: "))
        for line in shown.splitlines():
            frame, answer = re.fullmatch(r"(person: frame )\d+(: .*)", line).groups()  # type: ignore[union-attr]
            assert re.search(re.escape(frame) + r"\d+" + re.escape(answer), printed), f"{line}\n{printed}"


@pytest.mark.parametrize("beginning", NOT_RUN)
def test_what_is_not_run_is_there(beginning: str) -> None:
    """A reason for a command that is gone would hide the next one that begins so."""
    assert any(command.startswith(beginning) for block in SHELL for command in commands(block))


def test_make_demo_is_what_the_readme_shows(desk: Path) -> None:
    """The line that asks, as the Makefile has it, and the answer below it."""
    shown = blocks("")[0].text
    asked = re.search(r"^\.venv/bin/(vz-edge run .*)\n(.*)$", shown, re.MULTILINE)
    assert asked and f"$(BIN)/{asked[1]}" in text_of("Makefile")
    assert shell(asked[1], desk).splitlines()[0] == asked[2]


def test_the_dataflow_of_the_document_is_the_examples() -> None:
    (shown,) = [block.text for block in blocks("yaml") if block.text.startswith("nodes:")]
    assert shown == text_of("examples/dora/dataflow.yml")


# --- Python


class Camera:
    """What of OpenCV the documents use."""

    def set(self, setting: int, value: float) -> None:
        pass

    def read(self) -> tuple[bool, np.ndarray]:
        return True, np.zeros((40, 50, 3), np.uint8)

    def release(self) -> None:
        pass


def names(document: str, desk: Path) -> dict[str, Any]:
    """What the blocks of a document take for granted."""
    frame = np.asarray(Image.open(desk / "street.jpg"))
    given: dict[str, Any] = {"vz_edge": vz_edge, "frame": frame, "camera": [frame]}
    if document in ("docs/sessions.md", "docs/streams.md"):
        given["model"] = vz_edge.EdgeModel.load(desk / "llava-13b", threads=1)
        given["cv2"] = SimpleNamespace(VideoCapture=lambda number: Camera(), CAP_PROP_FRAME_WIDTH=3)
        given |= {"on_result": print, "control_loop": lambda: None, "live": lambda: iter([frame, frame[200:]])}
    return given


def transformers_names() -> dict[str, Any]:
    """A model, its processor and a prompt of transformers, before ``vz_edge.compress``."""
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    folder = REPOSITORY / "export" / "vz-demo"
    processor = AutoProcessor.from_pretrained(folder)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many objects are there?"}]}
    return {
        "model": LlavaNextForConditionalGeneration.from_pretrained(folder),
        "processor": processor,
        "prompt": processor.apply_chat_template([question], add_generation_prompt=True),
    }


def execute(block: Block, given: dict[str, Any]) -> None:
    text = block.text
    for document, written, run in CHANGED:
        if document == block.document:
            text = text.replace(written, run)
    code = compile(text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, given)
    if inspect.iscoroutine(result):
        asyncio.run(result)


@pytest.mark.parametrize("document", sorted({block.document for block in PYTHON if not reason_against(block)}))
def test_python_runs(document: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a document in one namespace, since each goes on from the one before it."""
    monkeypatch.chdir(desk)
    given = names(document, desk)
    for block in PYTHON:
        if block.document == document and not reason_against(block):
            if "vz_edge.compress(" in block.text and "from_pretrained" not in block.text:
                given |= transformers_names()
            execute(block, given)


@pytest.mark.parametrize("part", PYTHON_NOT_RUN)
def test_python_that_is_not_run_is_there(part: str) -> None:
    assert any(part in block.text for block in PYTHON)


@pytest.mark.parametrize(("document", "written", "run"), CHANGED)
def test_what_is_changed_is_there(document: str, written: str, run: str) -> None:
    assert any(written in block.text for block in PYTHON if block.document == document)


# --- data, tables, links


@pytest.mark.parametrize("block", blocks("yaml", "json"), ids=str)
def test_data_can_be_read(block: Block) -> None:
    assert (json.loads if block.language == "json" else yaml.safe_load)(block.text)


def test_every_block_says_what_it_is() -> None:
    """A block in an unknown language would never be looked at."""
    known = {"sh", "python", "yaml", "json", "dockerfile", ""}
    assert {
        language for document in DOCUMENTS for language in re.findall(r"^```(\w+)", text_of(document), re.M)
    } <= known


def test_the_table_of_models_is_that_of_the_recipes() -> None:
    rows = {row[0].strip("`"): row for row in table_rows("docs/models.md", "recipe")}
    assert set(rows) == set(recipe_names())
    for name, (_, checkpoint, tokens, license_) in rows.items():
        recipe = load_recipe(name)
        assert recipe.checkpoint in checkpoint and recipe.license is not None and recipe.license.name == license_
        assert tokens == f"{recipe.tokens} ({recipe.model.max_tiles * recipe.model.tower.patches})"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in links(document):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (REPOSITORY / document).parent / path if path else REPOSITORY / document
        assert found.exists(), f"{document}: {target}"
        if anchor:
            assert anchor in anchors(found.resolve().relative_to(REPOSITORY).as_posix()), f"{document}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_nobody_is_sent_to_an_index_for_vz_edge(document: str) -> None:
    """It is on none: an extra is asked for in a clone (``.[cpu]``) or of a wheel, and the wheel is this version's."""
    assert "vz-edge[" not in text_of(document)
    wheels = re.findall(r"vz_edge-([\w.]+)-py3-none-any\.whl", text_of(document))
    assert set(wheels) <= {vz_edge.__version__}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_are_there(document: str) -> None:
    """``vz_edge/device/image.py`` and the like in the running text, in folders of this repository."""
    for name in re.findall(r"`((?:\w[\w-]*/)+[\w.-]+\.(?:md|py|yaml|yml|txt|sh|jpg|png|cpp))`", text_of(document)):
        folders = (REPOSITORY, (REPOSITORY / document).parent)
        ours = any((folder / Path(name).parts[0]).is_dir() for folder in folders)
        assert not ours or "NAME" in name or any((folder / name).exists() for folder in folders), name


def test_the_index_lists_every_document() -> None:
    listed = {Path(target.partition("#")[0]).name for target in links("docs/index.md")}
    assert {path.name for path in (REPOSITORY / "docs").glob("*.md")} - {"index.md"} <= listed
