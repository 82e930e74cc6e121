"""``vz-edge watch``: questions about the newest frame of a camera, a stream or a recording, again and again."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vz_edge.errors import RequestError, SourceError

if TYPE_CHECKING:
    from vz_edge.watch import Result
    from vz_edge.watch.engine import Question
    from vz_edge.watch.source import AnySource


def command(
    bundle: Annotated[Path, typer.Argument(help="A folder written by 'vz-edge export'.")],
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of pictures, a video file, a ROS bag, a camera's number or device, an address with ://, or "
            "a GStreamer pipeline."
        ),
    ],
    questions: Annotated[
        list[str],
        typer.Argument(
            help='Each in quotes; with options as JSON: \'{"question": "Open?", "schema": ["yes", "no"]}\'.'
        ),
    ],
    every: Annotated[float | None, typer.Option(help="Take frames at least so many seconds apart.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds that a frame has, from when it is taken.")] = None,
    unchanged_below: Annotated[
        float | None, typer.Option(help="Do not look at a picture no patch of which changed by so many grey levels.")
    ] = None,
    stalled_after: Annotated[
        float, typer.Option(help="Give up a source that gives no frame for so long; 0: never.")
    ] = (10.0),
    tokens: Annotated[int | None, typer.Option(help="As for 'vz-edge run'.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 128,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    topic: Annotated[str | None, typer.Option(help="Of a ROS bag that has pictures of several.")] = None,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Play a video or bag at its own pace, dropping frames as a robot would.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="A line of JSON for each frame; a pipe gets it so anyway.")
    ] = False,
    provider: Annotated[list[str] | None, typer.Option(help="As for 'vz-edge run'.")] = None,
    device_id: Annotated[int | None, typer.Option(help="The number of the GPU, as CUDA counts; default: 0.")] = None,
    vision: Annotated[Literal["onnx", "torch"], typer.Option(help="As for 'vz-edge run'.")] = "onnx",
    threads: Annotated[int | None, typer.Option(help="Threads; default: the physical cores.")] = None,
    max_context: Annotated[int | None, typer.Option(help="Refuse more tokens of context than this.")] = None,
    release_memory: Annotated[
        bool | None, typer.Option("--release-memory/--keep-memory", help="As for 'vz-edge run'.")
    ] = None,
) -> None:
    """Ask about the newest frame of SOURCE until it ends, or Ctrl-C."""
    from vz_edge.cli.verbosity import LOGGER, erase, note, showing_what_is_done
    from vz_edge.device.model import EdgeModel
    from vz_edge.serve.robot import as_json as json_of
    from vz_edge.serve.robot import question_of

    opened = _source(source, topic, realtime)
    asked = [_with_limit(question_of(text), max_new_tokens) for text in questions]
    with showing_what_is_done():
        model = EdgeModel.load(
            bundle,
            providers=provider,
            threads=threads,
            max_context=max_context,
            vision=vision,
            device=device_id,
            release_memory=release_memory,
        )
        watch = model.watch(
            opened,
            asked,
            every=every,
            deadline=deadline,
            unchanged_below=unchanged_below,
            stalled_after=stalled_after or None,
            tokens=tokens,
            system=system,
        )
        json_lines = as_json or not sys.stdout.isatty()
        with warnings.catch_warnings(), watch:
            warnings.showwarning = lambda message, *_, **__: LOGGER.warning("%s", message)
            try:
                for result in watch:
                    erase()
                    print(json_of(result, asked) if json_lines else readable(result, asked), flush=True)
            finally:
                counted = watch.metrics.as_dict()
                taken, dropped = (int(counted[f"vz_edge_watch_frames_{name}_total"]) for name in ("taken", "dropped"))
                note(f"[{taken} frame(s) taken, {dropped} dropped]")


def readable(result: Result, questions: Sequence[Question]) -> str:
    """A result for a person: the frame and what it took, and each answer in a line."""
    remarks = [f"{result.timings.total_sec:.2f} s"]
    if result.dropped:
        remarks.append(f"{result.dropped} dropped")
    if not result.changed:
        remarks.append("unchanged")
    if result.deadline_missed:
        remarks.append("deadline missed")
    lines = [f"{result.frame_id}  ({', '.join(remarks)})"]
    if result.error is not None:
        lines.append(f"  {result.error}")
    for question, reply in zip(questions, result.replies, strict=True):
        text = question if isinstance(question, str) else question[0]
        if reply is not None:
            lines.append(f"  {text}  {' '.join(reply.text.split())}")
        elif result.error is None:
            lines.append(f"  {text}  -")
    return "\n".join(lines)


def _source(text: str, topic: str | None, realtime: bool) -> AnySource:
    """What ``text`` names, known before a model is loaded for it. Raises SourceError and RequestError."""
    from vz_edge.watch import BagSource, VideoSource
    from vz_edge.watch.bag import is_bag

    if text.isdecimal():
        return int(text)
    if not ("://" in text or "!" in text or os.path.exists(text)):
        raise SourceError(
            f"{text} does not exist; expected a folder of pictures, a video, a bag, a camera or an address"
        )
    if is_bag(Path(text)):
        return BagSource(text, topic, realtime)
    if topic is not None:
        raise RequestError(f"--topic {topic} is for a ROS bag, and {text} is none; leave it out")
    if not realtime:
        return text
    if not os.path.isfile(text):
        raise RequestError(f"--realtime is for a video file or a bag, and {text} is neither; leave it out")
    return VideoSource(text, realtime=True)


def _with_limit(question: Question, max_new_tokens: int) -> Question:
    text, options = (question, {}) if isinstance(question, str) else question
    return text, {"max_new_tokens": max_new_tokens, **options}
