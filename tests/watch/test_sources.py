"""Folders, videos and bags give the pictures that were put in, and say what is wrong with them."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as Writer2
from rosbags.typesys import Stores, get_typestore

from tests.watch.camera import picture
from vz_edge.device.image import load_image
from vz_edge.device.model import EdgeModel
from vz_edge.device.requirements import install_command
from vz_edge.errors import DependencyError, ImageError, RequestError, SourceError
from vz_edge.watch import BagSource, FolderSource, Frame, IteratorSource, Source, VideoSource
from vz_edge.watch.frame import picture_of
from vz_edge.watch.source import open_source

STAMPS_NSEC = [1_700_000_000_000_000_000 + i * 100_000_000 for i in range(3)]


def pixels(frame: Frame) -> np.ndarray:
    return np.asarray(load_image(picture_of(frame)))


def flat(level: int) -> np.ndarray:
    """A picture that lossy codecs keep: red at ``level``."""
    array = np.zeros((48, 64, 3), np.uint8)
    array[..., 0] = level
    return array


class TestOpenSource:
    def test_each_kind_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "bag").mkdir()
        (tmp_path / "bag" / "metadata.yaml").touch()
        kinds: list[tuple[Any, type, str]] = [
            (0, VideoSource, "live"),
            ("rtsp://camera/1", VideoSource, "live"),
            ("v4l2src ! appsink", VideoSource, "live"),
            ("v4l2src ! " + 40 * "queue ! " + "appsink", VideoSource, "live"),  # longer than a file's name may be
            ("/dev/null", VideoSource, "live"),
            (tmp_path / "a.mp4", VideoSource, "recorded"),
            (tmp_path, FolderSource, "recorded"),
            (str(tmp_path / "bag"), BagSource, "recorded"),
            (tmp_path / "a.bag", BagSource, "recorded"),
            ([picture(0)], IteratorSource, "recorded"),
            (iter([picture(0)]), IteratorSource, "live"),
        ]
        for given, kind, delivery in kinds:
            found = open_source(given)
            assert (type(found), found.delivery) == (kind, delivery), given
        source = VideoSource("a.mp4", realtime=True)
        assert open_source(source) is source and source.delivery == "replayed"
        assert BagSource("a.bag", realtime=True).delivery == "replayed"

    def test_what_is_no_source_is_refused(self) -> None:
        for wrong in (None, 1.5, picture(0)):
            with pytest.raises(RequestError, match="no source of frames"):
                open_source(wrong)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="color 'yuv' is unknown"):
            open_source([], "yuv")  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="knows its own"):
            open_source(0, "bgr")


class TestFolder:
    def test_pictures_come_by_name(self, tmp_path: Path, model: EdgeModel) -> None:
        for name in ("b.png", "a.PNG", "c.bmp"):
            Image.fromarray(picture(ord(name[0]))).save(tmp_path / name)
        (tmp_path / "notes.txt").write_text("no picture")
        (tmp_path / "broken.jpg").write_bytes(b"no picture either")
        (tmp_path / "folder.png").mkdir()
        results = list(model.watch(tmp_path, "Why?"))
        assert [result.frame_id for result in results] == ["a.PNG", "b.png", "broken.jpg", "c.bmp"]
        assert [isinstance(result.error, ImageError) for result in results] == [False, False, True, False]
        for result in (results[0], results[3]):
            expected = model.ask(picture(ord(str(result.frame_id)[0])), "Why?")
            assert result.replies[0].token_ids == expected.token_ids  # type: ignore[union-attr]

    def test_no_pictures_and_no_folder_are_errors(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="holds no picture"):
            next(FolderSource(tmp_path).frames())
        with pytest.raises(SourceError, match="cannot be read"):
            next(FolderSource(tmp_path / "absent").frames())


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames a quarter of a second apart, ever redder."""
    path = tmp_path_factory.mktemp("video") / "red.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 4, (64, 48))
    assert writer.isOpened()
    for level in range(8):
        writer.write(flat(30 * level)[..., ::-1])
    writer.release()
    return path


class TestVideo:
    def test_frames_are_rgb_and_have_the_files_stamps(self, video: Path) -> None:
        frames = list(VideoSource(video).frames())
        for level, frame in enumerate(frames):
            assert np.abs(pixels(frame).astype(int) - flat(30 * level)).max() < 12  # MJPEG is lossy
        stamps = np.array([frame.stamp_sec for frame in frames])
        assert np.diff(stamps) == pytest.approx(0.25) and len(frames) == 8

    def test_a_file_waits_and_every_passes_over(self, video: Path, model: EdgeModel) -> None:
        watch = model.watch(video, "Why?", every=0.5)
        assert [(result.frame_id, result.dropped) for result in watch] == [(0, 0), (2, 1), (4, 1), (6, 1)]
        samples = watch.metrics.as_dict()
        names = ("read", "taken", "dropped")
        assert [samples[f"vz_edge_watch_frames_{name}_total"] for name in names] == [8, 4, 4]

    def test_what_cannot_be_opened_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "text.mp4").write_text("no video")
        with pytest.raises(SourceError, match="cannot open"):
            next(VideoSource(tmp_path / "text.mp4").frames())
        with pytest.raises(SourceError, match="does not exist"):
            next(VideoSource(tmp_path / "absent.mp4").frames())
        with pytest.raises(SourceError, match="cannot open"):
            next(VideoSource("/dev/null").frames())

    @pytest.mark.skipif("GStreamer:                   NO" not in cv2.getBuildInformation(), reason="it has GStreamer")
    def test_a_pipeline_without_gstreamer_says_what_to_install(self) -> None:
        with pytest.raises(SourceError, match="has no GStreamer"):
            next(VideoSource("videotestsrc ! appsink").frames())

    def test_a_camera_that_stops_is_an_error_and_is_released(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Capture:
            reads = iter([(True, flat(1)[..., ::-1]), (True, flat(1)[..., 0]), (False, None)])
            released = False

            def __init__(self, *_: object) -> None: ...

            def isOpened(self) -> bool:  # noqa: N802
                return True

            def read(self) -> tuple[bool, np.ndarray | None]:
                return next(self.reads)

            def release(self) -> None:
                Capture.released = True

        monkeypatch.setattr(cv2, "VideoCapture", Capture)
        frames = VideoSource(0).frames()
        colour, grey = next(frames), next(frames)
        assert np.array_equal(pixels(colour), flat(1)) and pixels(grey).shape == (48, 64, 3)
        assert colour.stamp_sec is None
        with pytest.raises(SourceError, match="0 stopped giving frames"):
            next(frames)
        assert Capture.released

    def test_a_video_is_released_where_it_is_left(self, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        released = []
        real = cv2.VideoCapture

        class Capture:
            def __init__(self, *arguments: Any) -> None:
                self.real = real(*arguments)

            def __getattr__(self, name: str) -> Any:
                return released.append(name) or self.real.release if name == "release" else getattr(self.real, name)

        monkeypatch.setattr(cv2, "VideoCapture", Capture)
        frames = VideoSource(video).frames()
        next(frames)
        frames.close()
        assert released == ["release"]


def raw(store: Any, encoding: str, stamp_nsec: int = 0, padding: int = 0) -> Any:
    """The picture ``flat(90)`` as a sensor_msgs/Image."""
    array = {"rgb8": flat(90), "bgr8": flat(90)[..., ::-1], "mono8": flat(90)[..., 0]}.get(encoding, flat(90))
    rows = np.ascontiguousarray(array).reshape(48, -1)
    rows = np.hstack([rows, np.full((48, padding), 255, np.uint8)])
    return store.types["sensor_msgs/msg/Image"](
        header=header(store, stamp_nsec),
        height=48,
        width=64,
        encoding=encoding,
        is_bigendian=0,
        step=rows.shape[1],
        data=rows.ravel(),
    )


def compressed(store: Any, kind: str, stamp_nsec: int = 0) -> Any:
    buffer = io.BytesIO()
    Image.fromarray(flat(90)).save(buffer, kind)
    data = np.frombuffer(buffer.getvalue(), np.uint8)
    message = store.types["sensor_msgs/msg/CompressedImage"]
    return message(header=header(store, stamp_nsec), format=kind, data=data)


def header(store: Any, stamp_nsec: int) -> Any:
    stamp = store.types["builtin_interfaces/msg/Time"](sec=stamp_nsec // 10**9, nanosec=stamp_nsec % 10**9)
    fields = {"seq": 0} if store is ROS1 else {}
    return store.types["std_msgs/msg/Header"](stamp=stamp, frame_id="camera", **fields)


ROS1, ROS2 = get_typestore(Stores.ROS1_NOETIC), get_typestore(Stores.ROS2_HUMBLE)


def write_bag(path: Path, topics: dict[str, list[Any]], storage: StoragePlugin = StoragePlugin.SQLITE3) -> Path:
    """A ROS 2 bag with these messages, recorded a tenth of a second apart."""
    with Writer2(path, version=9, storage_plugin=storage) as writer:
        for topic, messages in topics.items():
            connection = writer.add_connection(topic, messages[0].__msgtype__, typestore=ROS2)
            for nsec, message in zip(STAMPS_NSEC, messages, strict=False):
                writer.write(connection, nsec, ROS2.serialize_cdr(message, message.__msgtype__))
    return path


class TestBag:
    @pytest.mark.parametrize("storage", list(StoragePlugin))
    def test_raw_pictures_in_every_encoding(self, tmp_path: Path, storage: StoragePlugin) -> None:
        messages = [raw(ROS2, encoding, padding=5) for encoding in ("rgb8", "bgr8", "mono8")]
        bag = write_bag(tmp_path / "bag", {"/camera": messages}, storage)
        source = open_source(bag)
        rgb, bgr, mono = source.frames()
        assert np.array_equal(pixels(rgb), flat(90)) and np.array_equal(pixels(bgr), flat(90))
        assert np.array_equal(pixels(mono), np.full((48, 64, 3), 90))
        assert [frame.stamp_sec for frame in (rgb, bgr, mono)] == [nsec / 10**9 for nsec in STAMPS_NSEC]

    def test_compressed_pictures_and_their_own_stamps(self, tmp_path: Path) -> None:
        messages = [compressed(ROS2, kind, stamp_nsec=5_250_000_000) for kind in ("png", "jpeg")]
        png, jpeg = BagSource(write_bag(tmp_path / "bag", {"/camera/compressed": messages})).frames()
        assert np.array_equal(pixels(png), flat(90))
        assert np.abs(pixels(jpeg).astype(int) - flat(90)).max() < 12
        assert png.stamp_sec == 5.25

    def test_a_ros_1_bag(self, tmp_path: Path) -> None:
        message = raw(ROS1, "bgr8")
        with Writer1(tmp_path / "old.bag") as writer:
            connection = writer.add_connection("/camera", message.__msgtype__, typestore=ROS1)
            writer.write(connection, STAMPS_NSEC[0], ROS1.serialize_ros1(message, message.__msgtype__))
        (frame,) = open_source(tmp_path / "old.bag").frames()
        assert np.array_equal(pixels(frame), flat(90))

    def test_a_bag_is_watched_to_its_end_though_a_message_is_bad(self, tmp_path: Path, model: EdgeModel) -> None:
        broken = compressed(ROS2, "jpeg")
        broken.data = broken.data[:100]
        short = raw(ROS2, "rgb8")
        short.data = short.data[:-1]
        for index, (bad, found) in enumerate(
            [(broken, "cannot be read"), (raw(ROS2, "16UC1"), "encoding 16UC1"), (short, "9215 bytes; expected 9216")]
        ):
            good = compressed(ROS2, "png") if bad is broken else raw(ROS2, "bgr8")
            results = list(model.watch(write_bag(tmp_path / str(index), {"/camera": [good, bad, good]}), "Why?"))
            assert [result.error is None for result in results] == [True, False, True]
            assert found in str(results[1].error) and isinstance(results[1].error, ImageError)

    def test_one_topic_is_chosen(self, tmp_path: Path) -> None:
        bag = write_bag(tmp_path / "bag", {"/left": [raw(ROS2, "rgb8")], "/right": [raw(ROS2, "mono8")] * 2})
        with pytest.raises(SourceError, match="no topic was named, it has pictures under: /left, /right"):
            next(BagSource(bag).frames())
        with pytest.raises(SourceError, match="no pictures under /up"):
            next(BagSource(bag, "/up").frames())
        assert len(list(BagSource(bag, "/right").frames())) == 2

    def test_what_is_no_bag_or_has_no_picture_is_an_error(self, tmp_path: Path) -> None:
        time = ROS2.types["builtin_interfaces/msg/Time"](sec=1, nanosec=0)
        with pytest.raises(SourceError, match="no topic with pictures"):
            next(BagSource(write_bag(tmp_path / "bag", {"/clock": [time]})).frames())
        (tmp_path / "a.bag").write_text("no bag")
        for wrong in ("a.bag", "absent", "absent.bag"):
            with pytest.raises(SourceError, match="cannot be read as a bag"):
                next(BagSource(tmp_path / wrong).frames())


@pytest.mark.parametrize(
    ("source", "module", "extra"),
    [(VideoSource(0), "cv2", "video"), (BagSource("a.bag"), "rosbags.highlevel", "rosbag")],
)
def test_a_missing_package_is_named(source: Source, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyError, match=re.escape(install_command(extra))):
        next(source.frames())
