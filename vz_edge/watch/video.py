"""Cameras, network streams, GStreamer pipelines and video files, by way of OpenCV."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Literal

from vz_edge.device.requirements import install_command
from vz_edge.errors import DependencyError, SourceError
from vz_edge.watch.frame import Frame

MILLISECONDS = 1000


class VideoSource:
    """What ``cv2.VideoCapture`` opens.

    A camera's number or device file, an address ("rtsp://...") and a GStreamer pipeline ("v4l2src ! ... ! appsink",
    with a "!" in it) are live. A file is recorded, and its frames have the time stamps of the file; with ``realtime``
    it is played at its own pace. OpenCV from PyPI has no GStreamer; the one of JetPack and of distributions has.
    """

    def __init__(self, source: int | str | Path, realtime: bool = False) -> None:
        self._source = source
        self._file = isinstance(source, (str, Path)) and not (_is_stream(str(source)) or _is_device(Path(source)))
        self.delivery: Literal["live", "recorded", "replayed"] = "live"
        if self._file:
            self.delivery = "replayed" if realtime else "recorded"

    def frames(self) -> Generator[Frame, None, None]:
        """As Source.frames. A live source that gives no more frames ends with a SourceError, a file just ends."""
        cv2 = import_cv2()
        if self._file and not os.path.isfile(self._source):
            raise SourceError(f"{self._source} does not exist; expected a video file, a folder of pictures or a bag")
        pipeline = isinstance(self._source, str) and "!" in self._source
        target = self._source if isinstance(self._source, int) else str(self._source)
        capture = cv2.VideoCapture(target, cv2.CAP_GSTREAMER if pipeline else cv2.CAP_ANY)
        try:
            if not capture.isOpened():
                raise SourceError(self._closed(cv2, pipeline))
            while True:
                found, pixels = capture.read()
                if not found:
                    break
                stamp_sec = capture.get(cv2.CAP_PROP_POS_MSEC) / MILLISECONDS if self._file else None
                yield Frame(pixels, "gray" if pixels.ndim == 2 else "bgr", stamp_sec)
            if not self._file:
                raise SourceError(f"{self._source} stopped giving frames; check the camera or stream and watch it anew")
        finally:
            capture.release()

    def _closed(self, cv2: ModuleType, pipeline: bool) -> str:
        if pipeline and "GStreamer:                   NO" in cv2.getBuildInformation():
            return (
                "this OpenCV has no GStreamer, which the pipeline needs; use the OpenCV of JetPack or of the "
                "distribution in place of opencv-python-headless"
            )
        return f"OpenCV cannot open {self._source}; check that it is there, is a video and is not in use"


def import_cv2() -> ModuleType:
    """The cv2 module. Raises DependencyError where it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise DependencyError(
            f"OpenCV is not installed; {install_command('video')}, or install it as a package of the system"
        ) from error
    return cv2


def _is_stream(source: str) -> bool:
    return "!" in source or "://" in source


def _is_device(path: Path) -> bool:
    try:
        return path.is_char_device()
    except OSError:  # the name is longer than a file's can be
        return False
