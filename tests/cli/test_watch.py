"""``vz-edge watch``: lines of JSON in a pipe, lines for a person on a terminal, and an end as it is usual."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.test_cli import REPOSITORY, vz_edge
from tests.device import standin
from vz_edge.device.model import EdgeModel

QUESTION = "What is this?"
CHOICE = '{"question": "Which?", "schema": ["left", "right"]}'
LIMIT = ("--max-new-tokens", 6)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standin") / "bundle"
    standin.write_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def model(bundle: Path) -> EdgeModel:
    return EdgeModel.load(bundle, threads=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, and one that is none between them."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in (1, 3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "2.png").write_text("no picture")
    return folder


def test_a_folder_is_answered_in_lines_of_json_and_ends(bundle: Path, pictures: Path, model: EdgeModel) -> None:
    done = vz_edge("watch", bundle, pictures, QUESTION, CHOICE, *LIMIT, "--every", 0.5, "--deadline", 60)
    assert done.returncode == 0, done.stderr
    first, broken, last = map(json.loads, done.stdout.splitlines())
    for line, name in ((first, "1.png"), (last, "3.png")):
        expected = model.ask(pictures / name, QUESTION, max_new_tokens=6).text
        assert (line["frame_id"], line["error"], line["answers"][0]["text"]) == (name, None, expected)
        assert line["answers"][1]["value"] in ("left", "right")
    assert "cannot be read as a picture" in broken["error"] and broken["answers"][0]["text"] is None
    assert "passes over none of these frames" in done.stderr and "[3 frame(s) taken, 0 dropped]" in done.stderr
    quiet = vz_edge("watch", bundle, pictures, QUESTION, *LIMIT, "-q")
    assert quiet.returncode == 0 and quiet.stderr == "" and quiet.stdout.count("\n") == 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_lines_to_read(bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "StringIO", Terminal)  # what the command line prints to in these tests
    done = vz_edge("watch", bundle, pictures, QUESTION, "Why?", *LIMIT, "--unchanged-below", "300")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (
        lines[0].startswith("1.png  (") and lines[1].startswith(f"  {QUESTION}  ") and lines[2].startswith("  Why?  ")
    )
    assert "2.png cannot be read" in lines[4] and lines[5].endswith("unchanged)")
    assert "\r\x1b[Klooking at a picture of 50 x 40 pixels" in done.stderr
    assert vz_edge("watch", bundle, pictures, QUESTION, "--json").stdout.startswith("{")


def test_what_cannot_be_watched_is_one_line(bundle: Path, pictures: Path, tmp_path: Path) -> None:
    wrong = {
        "absent does not exist": (bundle, tmp_path / "absent", QUESTION),
        "is not a bundle": (tmp_path, pictures, QUESTION),
        "holds no picture": (bundle, tmp_path, QUESTION),
        "--topic /camera is for a ROS bag": (bundle, pictures, QUESTION, "--topic", "/camera"),
        "--realtime is for a video": (bundle, pictures, QUESTION, "--realtime"),
        "every -1.0": (bundle, pictures, QUESTION, "--every", "-1"),
        "is not understood": (bundle, pictures, '{"ask": 1}'),
        "budgets of 20 tokens": (bundle, pictures, QUESTION, "--tokens", "7"),
    }
    for message, arguments in wrong.items():
        done = vz_edge("watch", *arguments, "-q")
        assert done.returncode == 2 and done.stdout == "", (arguments, done)
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_it_cleanly(bundle: Path, pictures: Path, tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"{number:04}.png").symlink_to(pictures / "1.png")
    command = [sys.executable, "-m", "vz_edge", "watch", str(bundle), str(tmp_path), QUESTION, "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["frame_id"] == "0000.png"
        process.send_signal(signal.SIGINT)
        rest, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and "frame(s) taken" in stderr
    assert all(json.loads(line)["answers"] for line in rest.splitlines())
