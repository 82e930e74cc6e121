"""What can be given as a picture, and opening it with Pillow.

A path, the bytes of a file, a file that is open, or a Pillow image, which may not have read its own file yet.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image

from vz_edge.arguments import open_file, shown
from vz_edge.errors import ImageError


@runtime_checkable
class File(Protocol):
    """A file that is open for reading bytes: of ``open(..., "rb")``, an upload, io.BytesIO."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes."""


PictureFile = str | os.PathLike[str] | bytes | bytearray | memoryview | File


@contextmanager
def opened(source: PictureFile | Image.Image) -> Iterator[tuple[Image.Image, str]]:
    """A picture, whose pixels may still have to be read, and its name for messages.

    Files of the caller stay open. Raises ImageError, also for whatever is raised while the picture is being used.
    """
    name = _name_of(source)
    try:
        if isinstance(source, Image.Image):
            yield source, name
        elif isinstance(source, (str, os.PathLike)):
            with open_file(source) as file, Image.open(file) as image:
                yield image, name
        else:
            whole = isinstance(source, (bytes, bytearray, memoryview))
            with Image.open(io.BytesIO(source) if whole else source) as image:  # type: ignore[arg-type]
                yield image, name
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist; expected a picture file") from error
    # Pillow's decoders raise whatever a broken file makes them trip over (OSError, SyntaxError, struct.error...).
    except Exception as error:
        raise ImageError(f"{name} cannot be read as a picture ({error}); expected JPEG, PNG or the like") from error


def _name_of(source: object) -> str:
    if isinstance(source, Image.Image):
        return "picture"
    if isinstance(source, (str, Path)):
        return str(source) or "a path without letters"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"a picture of {memoryview(source).nbytes} bytes"
    if isinstance(source, (os.PathLike, File)) and not isinstance(source, type):
        return shown(source)
    raise ImageError(
        f"{shown(source)} is no picture; expected a path, a file's bytes, an open file, a Pillow image or an array"
    )
