"""The ROS 2 node in a thin stand-in for rclpy (ros_standin): its states, its topics, its service. No ROS was run."""

from __future__ import annotations

import array
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import Writer
from rosbags.typesys import Stores, get_typestore

from tests.serve import ros_standin
from tests.serve.ros_standin import ERROR, FAILURE, SUCCESS, CompressedImage, Image, LifecycleNode, Parameter, String
from tests.watch.camera import PATIENCE_SEC, picture
from vz_edge.device.model import EdgeModel
from vz_edge.errors import DependencyError
from vz_edge.serve import ros2

CHOICE = '{"question": "Which?", "schema": ["left", "right"]}'
REPOSITORY = Path(__file__).parents[2]
IMAGE = "sensor_msgs/msg/Image"
FREE = '{"question": "What is this?", "max_new_tokens": 4}'
Make = Callable[..., LifecycleNode]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, model: EdgeModel) -> Iterator[Make]:
    """Makes nodes with these parameters, which load the bundle in no time; ends them."""
    ros_standin.install(monkeypatch)
    monkeypatch.setattr(EdgeModel, "load", lambda bundle, **_: model)
    made: list[LifecycleNode] = []

    def node(**parameters: Any) -> LifecycleNode:
        given = {"bundle": "bundle", "questions": [FREE, CHOICE]} | parameters
        overrides = [Parameter(name, value) for name, value in given.items()]
        made.append(ros2.node_class()(parameter_overrides=overrides))  # type: ignore[arg-type,call-arg]
        return made[-1]

    yield node
    for one in made:
        one.destroy_node()


def started(node: LifecycleNode) -> LifecycleNode:
    assert node.transition("configure") is SUCCESS, node.get_logger().errors
    assert node.transition("activate") is SUCCESS, node.get_logger().errors
    return node


def raw(pixels: np.ndarray, encoding: str = "rgb8", stamp: tuple[int, int] = (7, 500_000_000)) -> Image:
    height, width, _ = pixels.shape
    data = array.array("B", (pixels if encoding == "rgb8" else pixels[..., ::-1]).tobytes())
    return Image(header_at(stamp), height, width, encoding, 0, 3 * width, data)


def compressed(pixels: np.ndarray) -> CompressedImage:
    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, "png")
    return CompressedImage(header_at((7, 0)), "rgb8; png compressed", array.array("B", buffer.getvalue()))


def header_at(stamp: tuple[int, int]) -> ros_standin.Header:
    return ros_standin.Header(ros_standin.Time(*stamp))


def published(node: LifecycleNode, count: int) -> list[dict[str, Any]]:
    """What was published, as soon as there are ``count``."""
    sent, deadline = node.publishers["answers"].sent, time.monotonic() + PATIENCE_SEC
    while len(sent) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(sent) == count
    return [json.loads(message.data) for message in sent]


def texts(answers: dict[str, Any]) -> list[str]:
    return [answer["text"] for answer in answers["answers"]]


def expected(model: EdgeModel, pixels: np.ndarray) -> list[str]:
    return [
        model.ask(pixels, "What is this?", max_new_tokens=4).text,
        model.ask(pixels, "Which?", schema=["left", "right"]).text,
    ]


def test_pictures_in_answers_out(make: Make, model: EdgeModel) -> None:
    node = started(make())
    for number, encoding in enumerate(("rgb8", "bgr8")):
        node.send("image", raw(picture(number), encoding))
        answers = published(node, number + 1)[-1]
        assert texts(answers) == expected(model, picture(number))
        assert (answers["frame_id"], answers["stamp_sec"], answers["error"]) == (number, 7.5, None)
        assert answers["answers"][1]["value"] in ("left", "right")
    assert node.entities["image"].qos == "best effort, the newest five"


def test_compressed_pictures_and_broken_ones(make: Make, model: EdgeModel) -> None:
    node = started(make(image_type="compressed"))
    node.send("image", compressed(picture(3)))
    assert texts(published(node, 1)[0]) == expected(model, picture(3))
    node.send("image", CompressedImage(header_at((0, 0)), "jpeg", array.array("B", b"no picture")))
    answers = published(node, 2)[1]
    assert "cannot be read" in answers["error"] and texts(answers) == [None, None]
    assert answers["stamp_sec"] == pytest.approx(time.time(), abs=PATIENCE_SEC)  # by the node's clock


def test_a_question_of_the_moment(make: Make, model: EdgeModel) -> None:
    node = started(make(questions=[""]))
    node.send("question", String(FREE))
    assert "no picture has come" in published(node, 1)[0]["error"]
    for pixels in (picture(1), picture(2)):
        node.send("image", raw(pixels))
    node.send("question", String("Which?"))
    node.send("question", String(CHOICE))
    node.send("question", String('{"ask": "Which?"}'))
    free, choice, wrong = published(node, 4)[1:]
    assert texts(free) == [model.ask(picture(2), "Which?").text]
    assert texts(choice) == expected(model, picture(2))[1:] and choice["frame_id"] == 1
    assert "unknown key" in wrong["error"]


def test_the_service_answers_the_configured_questions(make: Make, model: EdgeModel) -> None:
    node = started(make())
    response = node.call("ask")
    assert not response.success and "no picture has come" in json.loads(response.message)["error"]
    node.send("image", raw(picture(1)))
    response = node.call("ask")
    assert response.success and texts(json.loads(response.message)) == expected(model, picture(1))
    node.send("image", raw(picture(1), "yuv422"))
    response = node.call("ask")
    assert not response.success and "encoding yuv422" in json.loads(response.message)["error"]
    groups = {name: entity.callback_group for name, entity in node.entities.items()}
    assert groups["ask"] is groups["question"] is not groups["image"] is None


def test_a_lifecycle_goes_round(make: Make) -> None:
    node = make()
    node.send("image", raw(picture(0)))  # nobody listens yet
    for turn in (1, 2):
        started(node)
        node.send("image", raw(picture(0)))
        published(node, turn)
        assert node.transition("deactivate") is SUCCESS
        node.send("image", raw(picture(0)))
        assert not node.entities
        assert node.transition("cleanup") is SUCCESS
    assert node.state == "unconfigured" and node._model is None  # type: ignore[attr-defined]
    assert len(published(node, 2)) == 2


def test_shutdown_ends_an_active_node(make: Make) -> None:
    node = started(make())
    node.send("image", raw(picture(0)))
    assert node.transition("shutdown") is SUCCESS
    assert node.state == "finalized" and not node.entities


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ({"bundle": ""}, "the parameter bundle is not set"),
        ({"image_type": "theora"}, "image_type 'theora' is unknown"),
        ({"questions": ['{"question": 3}']}, "question: expected str"),
    ],
)
def test_a_bad_parameter_leaves_it_unconfigured(make: Make, parameters: dict[str, Any], found: str) -> None:
    node = make(**parameters)
    assert node.transition("configure") is FAILURE and node.state == "unconfigured"
    assert found in node.get_logger().errors[0]


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ({"every": -1.0}, "every -1.0"),
        ({"deadline": -1.0, "questions": [""]}, "deadline -1.0"),
        ({"tokens": 15}, "budgets of 20 tokens, not of 15"),
        ({"tokens": 15, "questions": [""]}, "budgets of 20 tokens, not of 15"),
        ({"questions": ["Why? " * 200]}, "do not fit"),
    ],
)
def test_what_cannot_be_watched_leaves_it_inactive(make: Make, parameters: dict[str, Any], found: str) -> None:
    node = make(**parameters)
    assert node.transition("configure") is SUCCESS
    assert node.transition("activate") is FAILURE and node.state == "inactive" and not node.entities
    assert found in node.get_logger().errors[0]


def test_an_activation_that_breaks_off_leaves_nothing_behind(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    node = make()

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such service")

    assert node.transition("configure") is SUCCESS
    with monkeypatch.context() as patch:
        patch.setattr(node, "create_service", refuse)
        assert node.transition("activate") is ERROR and node.state == "unconfigured" and not node.entities
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vz-edge-watch")]
    node.send("image", raw(picture(0)))
    started(node).send("image", raw(picture(0)))
    published(node, 1)


def fail_to_publish(node: LifecycleNode, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """From now on publishing fails; the event says that it did."""
    failed = threading.Event()

    def publish(_: String) -> None:
        failed.set()
        raise RuntimeError("no memory for a message")

    monkeypatch.setattr(node.publishers["answers"], "publish", publish)
    return failed


def test_what_ended_the_answers_is_raised_with_a_later_picture(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    node = started(make())
    fail_to_publish(node, monkeypatch)
    deadline = time.monotonic() + PATIENCE_SEC
    with pytest.raises(RuntimeError, match="no memory"):
        while time.monotonic() < deadline:
            node.send("image", raw(picture(0)))
            time.sleep(0.005)


def test_what_ended_the_answers_is_logged_when_it_is_stopped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    node = started(make())
    failed = fail_to_publish(node, monkeypatch)
    node.send("image", raw(picture(0)))
    assert failed.wait(PATIENCE_SEC)
    assert node.transition("deactivate") is SUCCESS
    assert "RuntimeError: no memory" in node.get_logger().errors[0]


def test_a_recorded_bag_is_replayed_into_the_node(make: Make, model: EdgeModel, tmp_path: Path) -> None:
    """What rosbags reads out of a bag has the fields that rclpy's messages have."""
    store = get_typestore(Stores.ROS2_HUMBLE)
    types = store.types
    with Writer(tmp_path / "bag", version=9) as writer:
        connection = writer.add_connection("/camera/image_raw", IMAGE, typestore=store)
        for number in range(3):
            pixels = picture(number)
            stamp = types["builtin_interfaces/msg/Time"](sec=number, nanosec=250_000_000)
            header = types["std_msgs/msg/Header"](stamp=stamp, frame_id="camera")
            message = types[IMAGE](header, *pixels.shape[:2], "rgb8", 0, 3 * pixels.shape[1], pixels.ravel())
            writer.write(connection, 10**9 * number, store.serialize_cdr(message, IMAGE))
    node = started(make())
    with AnyReader([tmp_path / "bag"]) as reader:
        for number, (connection, _, data) in enumerate(reader.messages()):
            node.entities["image"].callback(reader.deserialize(data, connection.msgtype))
            answers = published(node, number + 1)[-1]
            assert texts(answers) == expected(model, picture(number)) and answers["stamp_sec"] == number + 0.25
    watched = [result for result in model.watch(tmp_path / "bag", ["Which?"])]
    assert [result.stamp_sec for result in watched] == [0.25, 1.25, 2.25]


def test_without_ros_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rclpy", None)
    with pytest.raises(DependencyError, match=r"setup\.bash"):
        ros2.node_class()
    with pytest.raises(SystemExit) as ended:
        ros2.main()
    printed = capsys.readouterr().err
    assert (
        ended.value.code == 2 and printed.startswith("vz-edge: this Python has no ROS 2") and printed.count("\n") == 1
    )


def test_the_nodes_import_no_heavy_package() -> None:
    names = ["torch", "transformers", "onnxruntime", "dora", "pyarrow", "rclpy"]
    code = f"import sys, vz_edge.serve.dora, vz_edge.serve.ros2; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"
