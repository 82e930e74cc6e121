"""What a watch says about one frame."""

from __future__ import annotations

from dataclasses import dataclass

from vz_edge.device.reply import Reply
from vz_edge.errors import VzEdgeError


@dataclass(frozen=True)
class Timings:
    """Seconds that went into one frame; ``prefill_sec`` is the picture's and the questions', ``total_sec`` is all."""

    preprocess_sec: float = 0.0
    vision_sec: float = 0.0
    prefill_sec: float = 0.0
    decode_sec: float = 0.0
    total_sec: float = 0.0


@dataclass(frozen=True)
class Result:
    """The answers about one frame.

    ``replies`` has one for each question, in their order: cut short, with the finish_reason "deadline", where time was
    over in the middle of it, and None where time was over before it or an error kept it from being. Either of the
    first two makes ``deadline_missed``, and so does a frame that was ready after its deadline. ``error`` is the first
    error: the frame's, which none of the questions survives, or a question's. ``changed`` is False where the gate
    found the picture to be as the one before, whose KV cache then served.

    ``frame_id`` is the source's own, or the frame's number in the stream from 0; ``stamp_sec`` the frame's time by
    its source's clock. ``captured_at`` (``time.time``) and ``captured_monotonic_sec`` (``time.monotonic``) are when
    the source gave it; from then, ``age_sec`` passed until it was taken and ``latency_sec`` until the result was
    ready. ``dropped`` frames were read and passed over since the last result.
    """

    frame_id: str | int
    stamp_sec: float | None
    captured_at: float
    captured_monotonic_sec: float
    age_sec: float
    latency_sec: float
    dropped: int
    changed: bool
    replies: tuple[Reply | None, ...]
    deadline_missed: bool
    error: VzEdgeError | None
    timings: Timings
