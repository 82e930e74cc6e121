"""The chat of ``vz-edge run``: one session, whose answers are those of fresh asks; commands; terminals and pipes."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.test_cli import Done, vz_edge
from tests.device import standin
from vz_edge.cli import verbosity
from vz_edge.device.model import EdgeModel
from vz_edge.device.session import Session

LIMIT = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and two pictures, the name of one with a blank."""
    folder = tmp_path_factory.mktemp("chat")
    standin.write_bundle(folder / "bundle")
    for name, seed in (("one.png", 1), ("the other.png", 2)):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> EdgeModel:
    return EdgeModel.load(folder / "bundle", threads=1)


def chat(folder: Path, typed: str, *options: object) -> Done:
    return vz_edge("run", folder / "bundle", "--json", *LIMIT, *options, typed=typed)


def replies(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_the_picture_is_looked_at_once_and_turns_stay_in_the_cache(
    folder: Path, model: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Any] = []
    encode = type(model.vision).encode
    monkeypatch.setattr(type(model.vision), "encode", lambda self, *given: looks.append(given) or encode(self, *given))
    done = chat(folder, "One?\nTwo?\n/clear\nOne?\n", "--image", folder / "one.png")
    assert done.returncode == 0, done.stderr
    first, second, again = replies(done)
    assert len(looks) == 1
    assert again["token_ids"] == first["token_ids"] and again["prompt_tokens"] == first["prompt_tokens"]
    assert second["cached_tokens"] > first["cached_tokens"] >= first["image_tokens"] == 20
    fresh = model.ask(folder / "one.png", "One?", max_new_tokens=6)
    assert first["token_ids"] == list(fresh.token_ids)
    turns = [user("One?"), assistant(fresh.text), user("Two?")]
    assert second["token_ids"] == list(model.ask(folder / "one.png", turns, max_new_tokens=6).token_ids)


def test_the_commands(folder: Path, model: EdgeModel) -> None:
    other = folder / "the other.png"
    typed = f"Hello.\n/image {other}\nWhat?\n/system Be brief.\nWhat?\n/image {folder / 'one.png'} '{other}'\nWhat?\n"
    done = chat(folder, f"{typed}/system\nWhat?\n\n/help\n/quit\nnever asked\n")
    assert done.returncode == 0, done.stderr
    told = {"role": "system", "content": "Be brief."}
    both = [folder / "one.png", other]
    expected = [
        model.ask(None, "Hello.", max_new_tokens=6),
        model.ask(other, "What?", max_new_tokens=6),
        model.ask(other, [told, user("What?")], max_new_tokens=6),
        model.ask(both, [told, user("What?")], max_new_tokens=6),
        model.ask(both, "What?", max_new_tokens=6),
    ]
    assert [reply["token_ids"] for reply in replies(done)] == [list(reply.token_ids) for reply in expected]
    assert "/clear" in done.stderr and "[looked at 2 picture(s), 40 image tokens" in done.stderr


def test_an_error_leaves_the_chat_and_is_in_the_status_of_a_pipe(folder: Path, model: EdgeModel) -> None:
    typed = "/image absent.png\n/nothing\n/image\n/image 'a\n/etc/hosts?\nWhy?\n"
    done = chat(folder, typed, "--image", folder / "one.png")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for message in ("absent.png does not exist", "no command /nothing", "/image names no picture", "'a does not exist"):
        assert message in done.stderr
    path, last = replies(done)
    assert path["token_ids"] == list(model.ask(folder / "one.png", "/etc/hosts?", max_new_tokens=6).token_ids)
    turns = [user("/etc/hosts?"), assistant(path["text"]), user("Why?")]
    assert last["token_ids"] == list(model.ask(folder / "one.png", turns, max_new_tokens=6).token_ids)


def test_a_full_context_says_what_to_do_and_goes_on_after_it(folder: Path) -> None:
    done = chat(
        folder,
        "Why? " * 3 + "\n" + "And?\n" * 9 + "/clear\nAnd?\n",
        "--image",
        folder / "one.png",
        "--max-context",
        150,
    )
    assert done.returncode == 2
    full = [line for line in done.stderr.splitlines() if "do not fit the context of 150" in line]
    assert full and all(line.endswith("/clear forgets it and keeps the pictures") for line in full)
    assert len(full) + len(replies(done)) == 11 and replies(done)[-1]["cached_tokens"] >= 20
    too_long = chat(folder, "Why? " * 60 + "\n", "--max-context", 150)
    assert "/clear" not in too_long.stderr and too_long.stderr.count("\n") == 1


def test_a_system_prompt_is_told_first_or_refused(folder: Path, model: EdgeModel, tmp_path: Path) -> None:
    told = [{"role": "system", "content": "Be brief."}, user("Why?")]
    expected = list(model.ask(folder / "one.png", told, max_new_tokens=6).token_ids)
    asked = ("--image", folder / "one.png", "--system", "Be brief.")
    assert replies(chat(folder, "Why?\n", *asked))[0]["token_ids"] == expected
    assert json.loads(chat(folder, "", "Why?", *asked).stdout)["token_ids"] == expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A terminal at which these lines are typed; an exception is raised instead."""
    typed: list[Any] = []

    def type_line(prompt: str) -> str:
        assert prompt == "> "
        line = typed.pop(0) if typed else EOFError
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr(io, "StringIO", Terminal)  # what the command line prints to in these tests
    monkeypatch.setattr("builtins.input", type_line)
    yield typed


def test_at_a_terminal_it_streams_and_says_what_it_does(folder: Path, model: EdgeModel, terminal: list[Any]) -> None:
    terminal += ["Why?", KeyboardInterrupt, "/image absent.png", ""]
    done = vz_edge("run", folder / "bundle", *LIMIT, "--image", folder / "one.png")
    assert done.returncode == 0  # an error is no failure of who types
    assert done.stdout == model.ask(folder / "one.png", "Why?", max_new_tokens=6).text + "\n"
    for shown in ("loading ", "looking at a picture of 50 x 40 pixels, ", "reading "):
        assert f"\r\x1b[K{shown}" in done.stderr
    assert "/help lists commands" in done.stderr and "(/quit or Ctrl-D ends the chat)" in done.stderr


def test_ctrl_c_ends_an_answer_and_keeps_nothing_of_it(
    folder: Path, model: EdgeModel, terminal: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Session.stream
    interrupted: list[str] = []

    def interrupt(self: Session, question: str, **options: Any) -> Any:
        pieces = stream(self, question, **options)
        if question == "Stop?":
            for piece in pieces:
                interrupted.append(piece)
                raise KeyboardInterrupt
        return pieces

    monkeypatch.setattr(Session, "stream", interrupt)
    terminal += ["Stop?", "Why?"]
    done = vz_edge("run", folder / "bundle", *LIMIT, "--image", folder / "one.png", "-q")
    assert done.returncode == 0 and interrupted
    assert done.stdout.splitlines()[-1] == model.ask(folder / "one.png", "Why?", max_new_tokens=6).text


def test_a_question_streams_at_a_terminal_and_comes_whole_in_a_pipe(
    folder: Path, terminal: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(Terminal, "write", lambda self, text: written.append(text) or len(text))
    vz_edge("run", folder / "bundle", "Why?", *LIMIT, "-q")
    assert len([text for text in written if text]) > 2
    written.clear()
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    vz_edge("run", folder / "bundle", "Why?", *LIMIT, "-q")
    assert len([text for text in written if text]) == 2  # the answer, a newline


def test_several_pictures_as_a_shell_writes_them(folder: Path, model: EdgeModel) -> None:
    both = [folder / "one.png", folder / "the other.png"]
    expected = model.ask(both, "Which?", max_new_tokens=6).text
    ask = ("run", folder / "bundle", *LIMIT, "-q")
    assert vz_edge(*ask, "--image", both[0], both[1], "Which?").stdout == expected + "\n"
    assert vz_edge(*ask, "--image", both[0], "--image", both[1], "Which?").stdout == expected + "\n"
    unquoted = vz_edge(*ask, "--image", both[0], "Which", "is", "it?")
    assert unquoted.returncode == 2 and "expected one question, in quotes" in unquoted.stderr


def test_choices_show_their_probabilities(folder: Path) -> None:
    done = vz_edge("run", folder / "bundle", "Which?", "--choices", "left,right")
    assert done.stdout in ("left\n", "right\n")
    shares = done.stderr.splitlines()[0].split("; ")
    assert [share.split(": ")[0] for share in shares] == ["left", "right"]
    assert sum(float(share.split(": ")[1].rstrip("%")) for share in shares) == pytest.approx(100, abs=0.2)


def test_quiet_and_verbose_before_and_behind_the_command(folder: Path) -> None:
    run = ("run", folder / "bundle", "Why?", *LIMIT)
    assert vz_edge(*run).stderr.startswith("[0 image + ")
    for quiet in ((*run, "-q"), ("-q", *run), ("--quiet", *run)):
        assert vz_edge(*quiet).stderr == ""
    for verbose in ((*run, "-v"), ("-v", *run), ("--verbose", *run)):
        lines = vz_edge(*verbose).stderr.splitlines()
        assert lines[0].startswith("vz-edge: loading ") and "opened the vision graph" not in "".join(lines)
    for detailed in ((*run, "-vv"), ("-vv", *run)):
        assert "opened the vision graph" in vz_edge(*detailed).stderr
    assert "does not exist" in vz_edge("-q", "run", folder / "bundle", "Why?", "--image", "absent.png").stderr
    assert vz_edge(*run).stderr.startswith("[0 image + ")  # and nothing of it stays
    assert verbosity.LOGGER.level == logging.NOTSET


def test_the_library_says_nothing_by_itself(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import vz_edge as package

    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("vz_edge").handlers)
    code = "import sys; from vz_edge import EdgeModel; EdgeModel.load(sys.argv[1], threads=1).ask(None, 'Why?')"
    done = os.spawnve(
        os.P_WAIT,
        sys.executable,
        [sys.executable, "-c", code, str(folder / "bundle")],
        {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])},
    )
    assert done == 0 and capfd.readouterr() == ("", "")
    assert verbosity.LOGGER is logging.getLogger("vz_edge")
