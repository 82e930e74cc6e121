"""A dora-rs node: pictures in, answers out (docs/robots.md).

::

    nodes:
      - id: vz-edge
        path: python
        args: -m vz_edge.serve.dora
        env:
          VZ_EDGE_BUNDLE: bundles/llava-13b
          VZ_EDGE_QUESTIONS: |
            Is the door open?
            {"question": "Who is there?", "schema": ["nobody", "one person", "several people"]}
        inputs:
          image: {source: camera/image, queue_size: 1}
          question: person/question
        outputs: [answers]

Written for and tested with dora-rs 1.1.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from vz_edge.device.image import ImageSource
from vz_edge.device.model import EdgeModel
from vz_edge.device.requirements import install_command
from vz_edge.errors import DependencyError, ImageError, RequestError, VzEdgeError
from vz_edge.serve.robot import CameraSettings, PushedCamera, as_json, error_as_json, question_of
from vz_edge.watch import Frame, Result
from vz_edge.watch.encoding import ENCODINGS, decompress, unpack
from vz_edge.watch.engine import Question

if TYPE_CHECKING:
    import pyarrow
    from dora import Node

OUTPUT = "answers"
REQUEST_ID = "request_id"  # by which dora's services tell which request a response is for


def run(node: Node, model: EdgeModel, questions: Sequence[Question], settings: CameraSettings) -> None:
    """Answer until all inputs are closed, the last picture included, or until the dataflow is stopped."""

    def send(result: Result) -> None:
        stamps = {name: getattr(result, name) for name in ("frame_id", "stamp_sec", "captured_at", "dropped")}
        _send(node, as_json(result, questions), stamps)

    camera = PushedCamera(model, questions, settings, send)
    try:
        # The news that all inputs are closed may come before their last values; the end of the events does not.
        for event in node:
            if event["type"] == "STOP" and event["id"] != "ALL_INPUTS_CLOSED":
                return
            if event["type"] != "INPUT":
                continue
            value, metadata = event["value"], event["metadata"]
            if event["id"] == "image":
                camera.put(frame_of(value, metadata))
            elif event["id"] == "question":
                passed_on = {REQUEST_ID: metadata[REQUEST_ID]} if REQUEST_ID in metadata else {}
                _send(node, _answer(camera, value), passed_on)
        camera.finish()
    finally:
        camera.close()


def frame_of(value: pyarrow.Array, metadata: Mapping[str, Any]) -> Frame:
    """A picture by dora's convention: uint8 [bytes], with encoding, width and height in ``metadata``.

    The encoding is rgb8, bgr8, mono8 or that of a file, as jpeg. The stamp is when the message was sent. What is
    wrong with the picture is raised when the frame is answered.
    """
    encoding, sent, frame_id = (metadata.get(name) for name in ("encoding", "timestamp", "frame_id"))
    color = ENCODINGS.get(encoding, "rgb") if isinstance(encoding, str) else "rgb"
    return Frame(
        functools.partial(_picture, value, metadata),
        color,
        stamp_sec=sent.timestamp() if isinstance(sent, datetime) else None,
        id=frame_id if isinstance(frame_id, (str, int)) else None,
    )


def _picture(value: pyarrow.Array, metadata: Mapping[str, Any]) -> ImageSource:
    encoding = metadata.get("encoding")
    if not isinstance(encoding, str):
        raise ImageError("a picture has no encoding in its metadata; expected rgb8, bgr8, mono8, jpeg or png")
    data = value.to_numpy(zero_copy_only=False)
    if data.dtype != np.uint8:
        raise ImageError(f"a picture is an Arrow array of {value.type}; expected uint8")
    if encoding not in ENCODINGS:
        return decompress(data, encoding)
    height, width = metadata.get("height"), metadata.get("width")
    if not (isinstance(height, int) and isinstance(width, int)):
        raise ImageError(f"a picture has height {height} and width {width} in its metadata; expected two integers")
    return unpack(data, encoding, height, width)


def _answer(camera: PushedCamera, value: pyarrow.Array) -> str:
    try:
        text = value[0].as_py() if len(value) else ""
        if not isinstance(text, str):
            raise RequestError(f"a question is an Arrow array of {value.type}; expected one string")
        question = question_of(text)
        return as_json(camera.ask([question]), [question])
    except VzEdgeError as error:
        return error_as_json(error)


def _send(node: Node, answers: str, metadata: dict[str, Any]) -> None:
    import pyarrow

    node.send_output(OUTPUT, pyarrow.array([answers]), metadata)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bundle: Annotated[Path, typer.Argument(envvar="VZ_EDGE_BUNDLE", help="A folder written by 'vz-edge export'.")],
    questions: Annotated[
        str, typer.Option(envvar="VZ_EDGE_QUESTIONS", help="Asked about each newest frame; one a line.")
    ] = "",
    every: Annotated[float | None, typer.Option(envvar="VZ_EDGE_EVERY", help="Seconds between two frames.")] = None,
    deadline: Annotated[float | None, typer.Option(envvar="VZ_EDGE_DEADLINE", help="Seconds for a frame.")] = None,
    unchanged_below: Annotated[
        float | None, typer.Option(envvar="VZ_EDGE_UNCHANGED_BELOW", help="Grey levels of 255; do not look again.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(envvar="VZ_EDGE_TOKENS", help="As for 'vz-edge run'.")] = None,
    system: Annotated[str | None, typer.Option(envvar="VZ_EDGE_SYSTEM", help="What the model is told first.")] = None,
    provider: Annotated[list[str] | None, typer.Option(envvar="VZ_EDGE_PROVIDER", help="As for 'vz-edge run'.")] = None,
    device_id: Annotated[int | None, typer.Option(envvar="VZ_EDGE_DEVICE_ID", help="As for 'vz-edge run'.")] = None,
    threads: Annotated[int | None, typer.Option(envvar="VZ_EDGE_THREADS", help="As for 'vz-edge run'.")] = None,
    max_context: Annotated[int | None, typer.Option(envvar="VZ_EDGE_MAX_CONTEXT", help="As for 'vz-edge run'.")] = None,
) -> None:
    """Be a node of a dora dataflow: input image, and question if it is connected; output answers."""
    try:
        model = EdgeModel.load(bundle, provider, threads, max_context, device=device_id)
        asked = [question_of(line) for line in questions.splitlines() if line.strip()]
        run(_connect(), model, asked, CameraSettings(every, deadline, unchanged_below, system, tokens))
    except VzEdgeError as error:
        print(f"vz-edge: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


def _connect() -> Node:
    try:
        from dora import Node
    except ImportError as error:
        raise DependencyError(f"dora is not installed; {install_command('dora')} (Python 3.11 or later)") from error
    return Node()


if __name__ == "__main__":
    app()
