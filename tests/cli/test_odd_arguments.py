"""Arguments that nobody means: every command answers, or ends with a line and status 2; none shows a traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.test_cli import vz_edge
from tests.device import standin

COMMANDS: dict[str, tuple[str, ...]] = {
    "run": (
        *("--image", "--tokens", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--schema"),
        *("--choices", "--provider", "--vision", "--threads", "--max-context", "--device-id"),
    ),
    "watch": (
        *("--every", "--deadline", "--unchanged-below", "--stalled-after", "--tokens", "--max-new-tokens", "--system"),
        *("--topic", "--provider", "--threads", "--max-context", "--device-id", "--vision"),
    ),
    "verify": ("--provider", "--device-id"),
    "inspect": ("--bits", "--format", "--tokens", "--target", "--device"),
    "profile": (
        *("--runs", "--answer-tokens", "--size", "--provider", "--threads", "--device", "--json", "--html"),
        *("--baseline", "--fail-above", "--device-id"),
    ),
    "serve": ("--host", "--port", "--token-file", "--max-body-bytes", "--provider", "--threads", "--device-id"),
    "export": ("--bits", "--format", "--target", "--out", "--name"),
    "plan": ("--device", "--bits", "--tokens", "--max-context", "--frames-per-minute"),
    "devices": (),
    "models": (),
}
WORDS = ["", "5", "-1", "nan", "1e400", "9" * 30, "\udcff", "x" * 5000, "two\nlines", "\x1b[31m", "cuda,cpu"]
FILES = ["folder", "pipe", "empty", "text", "loop", "file/inside", "absent"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, a picture, and names that are no files to read."""
    folder = tmp_path_factory.mktemp("odd")
    standin.write_bundle(folder / "bundle")
    Image.new("RGB", (40, 30)).save(folder / "picture.png")
    (folder / "folder").mkdir()
    (folder / "frames").mkdir()
    (folder / "frames" / "0.png").symlink_to(folder / "picture.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
    (folder / "empty").touch()
    (folder / "text").write_text("no picture, no JSON\n")
    (folder / "file").touch()
    (folder / "loop").symlink_to("loop")
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a command writes lies in a folder of its own; none reaches the network or measures anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def assert_told(*arguments: object) -> None:
    done = vz_edge(*arguments)
    assert done.returncode in (0, 2), (arguments, done)
    assert "Traceback" not in done.stderr + done.stdout
    if done.returncode and done.stderr.startswith("vz-edge: "):  # the rest is typer's own, about how to call it
        assert done.stderr.count("\n") == 1 and done.stderr.strip().isprintable(), done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_odd_names(command: str, folder: Path) -> None:
    for word in [*WORDS, *(folder / name for name in FILES)]:
        more = (
            ("What?",)
            if command == "run"
            else (folder / "frames", "What?")
            if command == "watch"
            else ("--model", word)
            if command == "export"
            else ()
        )
        assert_told(command, *(() if command == "export" else (word,)), *more)
    if command == "watch":
        for word in [*WORDS, *(folder / name for name in FILES)]:
            assert_told(command, folder / "bundle", word, "What?", "--max-new-tokens", 2, "--stalled-after", 1)
            assert_told(command, folder / "bundle", folder / "frames", word, "--max-new-tokens", 2)


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command in COMMANDS for option in COMMANDS[command]]
)
def test_odd_values_of_options(command: str, option: str, folder: Path) -> None:
    given: dict[str, tuple[object, ...]] = {
        "run": (folder / "bundle", "What?", "--threads", 1, "--max-new-tokens", 2),
        "watch": (folder / "bundle", folder / "frames", "What?", "--threads", 1),
        "verify": (folder / "bundle",),
        "inspect": (folder / "bundle",),
        "profile": (folder / "bundle", "--size", "0x0"),  # nothing is measured
        "serve": (folder / "absent",),  # nothing is served
        "export": ("--model", "vz-demo", "--tokens", "1"),  # nothing is exported
        "plan": ("llava-1.5-7b",),
    }
    for word in [*WORDS[:8], folder / "folder", folder / "pipe", folder / "text"]:
        assert_told(command, *given[command], option, word)
