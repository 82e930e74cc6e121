"""config.json of a checkpoint, refused at once where nothing here exports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vz_edge.host import precheck
from vz_edge.host.checkpoint import read_json
from vz_edge.host.families import check_family


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint of a family that is there; its weights need not be.

    Raises CheckpointError, UnsafeCheckpointError and UnsupportedModelError.
    """
    precheck.check_folder(folder)
    config = read_json(folder / "config.json")
    precheck.check_config(config, folder)
    check_family(config)
    return config
