"""The file that a user names for what a command found out."""

from __future__ import annotations

import os
from pathlib import Path

from vz_edge.errors import RequestError


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or not there. Raises RequestError where it cannot be written."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RequestError(
            f"{path} cannot be written ({error.strerror}); name a file in a folder of yours, on a disk with room"
        ) from error
