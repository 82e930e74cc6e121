"""Streams: questions about the newest frame of a camera, a recording or any iterator (``EdgeModel.watch``).

>>> with model.watch(0, ["Is the door open?", "Is anyone there?"], every=0.5, deadline=0.4) as results:
...     for result in results:
...         door, person = result.replies
"""

from __future__ import annotations

from vz_edge.watch.background import Background
from vz_edge.watch.bag import BagSource
from vz_edge.watch.folder import FolderSource
from vz_edge.watch.frame import Frame
from vz_edge.watch.result import Result, Timings
from vz_edge.watch.source import IteratorSource, Source
from vz_edge.watch.video import VideoSource
from vz_edge.watch.watch import Watch

__all__ = [
    "Background",
    "BagSource",
    "FolderSource",
    "Frame",
    "IteratorSource",
    "Result",
    "Source",
    "Timings",
    "VideoSource",
    "Watch",
]
