"""A folder of pictures as a stream."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Literal

from PIL import Image

from vz_edge.errors import SourceError
from vz_edge.watch.frame import Frame


class FolderSource:
    """The picture files of a folder in the order of their names, which are the frames' ids. They have no time stamps.

    Pictures are told by the suffixes that Pillow reads; other files, and folders in it, are left out.
    """

    delivery: Literal["recorded"] = "recorded"

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def frames(self) -> Generator[Frame, None, None]:
        """As Source.frames."""
        suffixes = Image.registered_extensions()
        try:
            files = [path for path in self._folder.iterdir() if path.suffix.lower() in suffixes and path.is_file()]
        except OSError as error:
            raise SourceError(f"{self._folder} cannot be read ({error.strerror}); expected a folder") from error
        if not files:
            raise SourceError(f"{self._folder} holds no picture; expected files such as 0001.png or 0001.jpg")
        for path in sorted(files):
            yield Frame(path, id=path.name)
