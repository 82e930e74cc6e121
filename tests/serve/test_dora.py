"""The dora node in a real dataflow, and what its loop makes of each event."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from tests.watch.camera import picture
from vz_edge.device.model import EdgeModel
from vz_edge.serve.robot import CameraSettings, question_of

pytest.importorskip("dora", reason="dora-rs is not installed (Python 3.11 or later: pip install dora-rs)")
pa = pytest.importorskip("pyarrow")

from tests.serve.dora_camera import encoded  # noqa: E402
from vz_edge.serve import dora  # noqa: E402
from vz_edge.serve.dora import app, run  # noqa: E402

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
LONGEST_SEC = 90
CHOICE = '{"question": "Which?", "schema": ["left", "right"]}'
WATCHED = '{"question": "What is this?", "max_new_tokens": 4}\n' + CHOICE
ASKED = '{"question": "Who is there?", "max_new_tokens": 3}'
NOW = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)


@contextlib.contextmanager
def marked_processes() -> Iterator[dict[str, str]]:
    """An environment; whoever still runs in it at the end is ended, and the test fails."""
    mark = f"VZ_EDGE_TEST_MARK={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    left = []
    try:
        yield {**os.environ, name: value, "DORA_ZENOH_MULTICAST": "off"}  # nobody beyond this machine is looked for
    finally:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    left.append((process / "cmdline").read_bytes())
                    os.kill(int(process.name), signal.SIGKILL)
    assert left == []


def dataflow(bundle: Path) -> dict[str, Any]:
    # dora would run a script with the first python of PATH, which need not be that of the tests.
    python = {"path": sys.executable}
    camera = {"id": "camera", **python, "args": str(HERE / "dora_camera.py"), "inputs": {"done": "sink/done"}}
    node = {
        "id": "vz-edge",
        **python,
        "args": f"-m vz_edge.serve.dora {bundle} --threads 1",
        "env": {"VZ_EDGE_QUESTIONS": WATCHED, "VZ_EDGE_DEADLINE": LONGEST_SEC, "PYTHONPATH": str(REPOSITORY)},
        "inputs": {"image": {"source": "camera/image", "queue_size": 1}, "question": "sink/question"},
    }
    sink = {"id": "sink", **python, "args": str(HERE / "dora_sink.py"), "inputs": {"answers": "vz-edge/answers"}}
    return {
        "nodes": [
            {**camera, "outputs": ["image"]},
            {**node, "outputs": ["answers"]},
            {**sink, "outputs": ["question", "done"]},
        ]
    }


def test_a_dataflow_from_camera_to_answers(tmp_path: Path, bundle: Path, model: EdgeModel) -> None:
    (tmp_path / "dataflow.yml").write_text(yaml.safe_dump(dataflow(bundle)))
    code = f"import dora; dora.run('dataflow.yml', stop_after={LONGEST_SEC})"
    with marked_processes() as environment:
        environment |= {"OUT": str(tmp_path / "out.jsonl"), "QUESTION": ASKED}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=2 * LONGEST_SEC,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    watched = [line for line in lines if "request_id" not in line[1]]
    expected = [(answer(model, picture(i), CHOICE), answer(model, picture(i), ASKED)) for i in range(3)]
    kinds = set()
    for answers, metadata in watched:
        kind = answers["frame_id"] % 4
        kinds.add(kind)
        for name in ("frame_id", "stamp_sec", "captured_at", "dropped"):
            assert metadata[name] == answers[name]
        if kind == 3:
            assert "'yuv422' cannot be read" in answers["error"]
            assert [reply["text"] for reply in answers["answers"]] == [None, None]
        else:
            assert answers["error"] is None and answers["answers"][1]["value"] == expected[kind][0]
            assert answers["answers"][1]["question"] == "Which?"
            assert set(answers["answers"][1]["probabilities"]) == {"left", "right"}
    assert kinds == {0, 1, 2, 3}
    *refused, (answers, metadata) = [line for line in lines if "request_id" in line[1]]
    assert answers["answers"][0]["text"] == expected[answers["frame_id"] % 4][1] and metadata["request_id"] == "r1"
    assert all(answers["error"] for answers, _ in refused)  # no picture yet, or the broken one


def answer(model: EdgeModel, pixels: np.ndarray, question: str) -> str:
    text, options = question_of(question)
    reply = model.ask(pixels, text, **options)  # type: ignore[arg-type]
    return reply.value or reply.text


class Node:
    """The events that it is given, then their end; what is sent is kept."""

    def __init__(self, *events: dict[str, Any]) -> None:
        self.events = events
        self.sent: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.events)

    def send_output(self, output: str, value: Any, metadata: dict[str, Any]) -> None:
        assert output == "answers" and len(value) == 1
        self.sent.append((json.loads(value[0].as_py()), metadata))


def event(name: str, value: Any, **metadata: Any) -> dict[str, Any]:
    return {"type": "INPUT", "id": name, "value": pa.array(value), "metadata": {"timestamp": NOW, **metadata}}


def image(number: int, **changes: Any) -> dict[str, Any]:
    data, metadata = encoded(number)
    given = {name: value for name, value in (metadata | changes).items() if value is not None}
    return event("image", data, **given)


CLOSED = {"type": "STOP", "id": "ALL_INPUTS_CLOSED"}


def test_the_last_picture_is_answered_though_its_end_was_known_before(model: EdgeModel) -> None:
    node = Node({"type": "INPUT_CLOSED", "id": "image"}, CLOSED, image(0, frame_id=None))
    run(node, model, [question_of(CHOICE)], CameraSettings())  # type: ignore[arg-type]
    (answers, metadata) = node.sent[-1]
    assert answers["answers"][0]["value"] == answer(model, picture(0), CHOICE)
    assert (metadata["frame_id"], metadata["stamp_sec"]) == (0, NOW.timestamp())


def test_a_stop_ends_it_at_once(model: EdgeModel) -> None:
    node = Node({"type": "STOP", "id": "MANUAL"}, event("question", ["Why?"]))
    run(node, model, [question_of(CHOICE)], CameraSettings())  # type: ignore[arg-type]
    assert node.sent == []


def test_questions_are_answered_without_any_that_are_watched(model: EdgeModel) -> None:
    node = Node(event("question", [ASKED]), image(1), event("question", [ASKED], request_id="7"))
    run(node, model, [], CameraSettings())  # type: ignore[arg-type]
    (early, none), (late, metadata) = node.sent
    assert "no picture has come" in early["error"] and early["answers"] == [] and none == {}
    assert late["answers"][0]["text"] == answer(model, picture(1), ASKED) and metadata == {"request_id": "7"}
    assert late["frame_id"] == 1


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ([7], "int64; expected one string"),
        (pa.array([], pa.string()), "is empty"),
        (["{"], "is not understood"),
        (['{"question": "Why?", "shema": ["a"]}'], "did you mean 'schema'"),
        (['{"question": "Why?", "max_new_tokens": 0}'], "max_new_tokens 0"),
        (["Why? " * 200], "do not fit the context"),
    ],
)
def test_a_bad_question_is_answered_with_its_error(model: EdgeModel, question: Any, found: str) -> None:
    node = Node(image(1), event("question", question), event("question", [ASKED]))
    run(node, model, [], CameraSettings())  # type: ignore[arg-type]
    (bad, _), (good, _) = node.sent
    assert found in bad["error"] and good["error"] is None


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (image(0, encoding=None), "no encoding"),
        (image(0, encoding=["rgb8"]), "no encoding"),
        (image(0, height=None), "height None"),
        (image(0, width=51), "holds 6000 bytes; expected 6120"),
        (image(0, encoding="jpeg"), "'jpeg' cannot be read"),
        (event("image", [0.5], encoding="rgb8", width=1, height=1), "Arrow array of double"),
    ],
)
def test_a_bad_picture_is_an_error_in_its_answers(model: EdgeModel, bad: dict[str, Any], found: str) -> None:
    node = Node(bad)
    run(node, model, [question_of(CHOICE)], CameraSettings())  # type: ignore[arg-type]
    ((answers, _),) = node.sent
    assert found in answers["error"]


def test_values_of_wrong_types_end_no_node(model: EdgeModel) -> None:
    """Each is answered with an error, or is left out; the picture behind them is answered."""
    wrong = [None, 5, -1, 2**60, True, 0.5, float("nan"), "x", "", [1], [], {"a": 1}, b"x", NOW]
    events = [
        {**image(0), "metadata": {**image(0)["metadata"], name: value}}
        for name in ("encoding", "width", "height", "timestamp", "frame_id")
        for value in wrong
    ]
    values = [[None], [[1]], [True], [0.5], [NOW], [{"a": 1}], ["\x00"], ["{" * 5000], ['{"question": {}}']]
    events += [event("question", value) for value in values]
    events += [event("image", value, encoding="rgb8", width=1, height=1) for value in values]
    node = Node(*events, image(0), event("question", [ASKED]))
    run(node, model, [], CameraSettings())  # type: ignore[arg-type]
    assert len(node.sent) == len(values) + 1 and node.sent[-1][0]["error"] is None
    node = Node(*events[-1:], *events[:5], image(0))
    run(node, model, [question_of(CHOICE)], CameraSettings())  # type: ignore[arg-type]
    assert node.sent[-1][0]["error"] is None


def test_what_ends_the_watch_ends_the_node(model: EdgeModel) -> None:
    class Broken(Node):
        def send_output(self, *_: Any) -> None:
            raise RuntimeError("the daemon is gone")

    with pytest.raises(RuntimeError, match="the daemon is gone"):
        run(Broken(image(0)), model, [question_of(CHOICE)], CameraSettings())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "found"),
    [("TOKENS", "tokens, not of 15"), ("DEADLINE", "deadline -1.0 is impossible"), ("EVERY", "every -1.0")],
)
def test_bad_settings_are_refused_at_the_start_without_questions_too(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, setting: str, found: str
) -> None:
    monkeypatch.setattr(dora, "_connect", Node)
    value = "15" if setting == "TOKENS" else "-1.0"
    environment = {"VZ_EDGE_BUNDLE": str(bundle), f"VZ_EDGE_{setting}": value, "VZ_EDGE_THREADS": "1"}
    done = CliRunner().invoke(app, [], env=environment)
    assert done.exit_code == 2 and found in done.stderr and done.stderr.count("\n") == 1


def test_what_is_wrong_at_the_start_is_one_line(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dora", None)
    for folder, questions, found in [
        (tmp_path / "absent", "Why?", "absent does not exist"),
        (bundle, "Why?\n{'question': 'Who?'}", "is not understood"),
        (bundle, "Why?", "pip install 'dora-rs>="),
    ]:
        environment = {"VZ_EDGE_BUNDLE": str(folder), "VZ_EDGE_QUESTIONS": questions, "VZ_EDGE_THREADS": "1"}
        done = CliRunner().invoke(app, [], env=environment)
        assert done.exit_code == 2 and found in done.stderr and done.stderr.count("\n") == 1
