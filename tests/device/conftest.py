from __future__ import annotations

from pathlib import Path

import pytest

from tests.device import standin
from vz_edge.device.model import EdgeModel


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-NeXT stand-in bundle with a budget of 3 + 1 tokens a tile."""
    folder = tmp_path_factory.mktemp("standin") / "bundle"
    standin.write_bundle(folder)
    return folder


@pytest.fixture(scope="session")
def model(bundle: Path) -> EdgeModel:
    return EdgeModel.load(bundle, threads=1)
