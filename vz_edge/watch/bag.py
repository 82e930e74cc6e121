"""ROS 1 and ROS 2 bags, by way of rosbags; no ROS is needed."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

from vz_edge.device.requirements import install_command
from vz_edge.errors import DependencyError, SourceError
from vz_edge.watch.encoding import NANOSECONDS, ros_frame
from vz_edge.watch.frame import Frame

RAW, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"


class BagSource:
    """The pictures of one topic: ``sensor_msgs/Image`` (rgb8, bgr8, mono8) or ``CompressedImage`` (JPEG, PNG).

    ``topic`` may be left out where the bag has pictures of one topic alone. Stamps are those of the messages' headers
    or, where a driver left them 0, of the recording. Recorded; with ``realtime`` played at its own pace.
    """

    def __init__(self, path: str | Path, topic: str | None = None, realtime: bool = False) -> None:
        self._path = Path(path)
        self._topic = topic
        self.delivery: Literal["recorded", "replayed"] = "replayed" if realtime else "recorded"

    def frames(self) -> Generator[Frame, None, None]:
        """As Source.frames."""
        try:
            from rosbags.highlevel import AnyReader, AnyReaderError
            from rosbags.typesys import Stores, get_typestore
        except ImportError as error:
            raise DependencyError(f"rosbags is not installed; {install_command('rosbag')}") from error
        # A bag without message definitions, as older ROS 2 wrote them, is read with the newest ones.
        try:
            reader = AnyReader([self._path], default_typestore=get_typestore(Stores.LATEST))
            reader.open()
        except (AnyReaderError, OSError) as error:
            raise SourceError(f"{self._path} cannot be read as a bag ({error}); record it again") from error
        try:
            connections = self._chosen(reader)
            for connection, received_nsec, data in reader.messages(connections):
                message = reader.deserialize(data, connection.msgtype)
                yield ros_frame(message, received_nsec / NANOSECONDS)
        finally:
            reader.close()

    def _chosen(self, reader: Any) -> list[Any]:
        connections = [found for found in reader.connections if found.msgtype in (RAW, COMPRESSED)]
        topics = sorted({found.topic for found in connections})
        topic = self._topic or (topics[0] if len(topics) == 1 else None)
        if topic not in topics:
            found = f"it has pictures under: {', '.join(topics)}" if topics else "it has no topic with pictures"
            wanted = f"no pictures under {topic}" if topic else "no topic was named"
            raise SourceError(f"{self._path}: {wanted}, {found}; name one with BagSource(path, topic)")
        return [connection for connection in connections if connection.topic == topic]


def is_bag(path: Path) -> bool:
    """Whether ``path`` is a ROS 2 bag's folder or a ROS 1 bag's file."""
    # A long pipeline is no file's name, for which Path.is_file raises.
    return path.suffix == ".bag" or os.path.isfile(path / "metadata.yaml")
