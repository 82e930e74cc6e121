from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.device import standin
from tests.watch.camera import PATIENCE_SEC
from vz_edge.device.fake_decoder import FakeDecoder
from vz_edge.device.model import EdgeModel


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaVA-NeXT stand-in bundle of tests/device."""
    folder = tmp_path_factory.mktemp("standin") / "bundle"
    standin.write_bundle(folder)
    return folder


@pytest.fixture(scope="session")
def model(bundle: Path) -> EdgeModel:
    """The stand-in with a decoder of numpy alone."""
    loaded = EdgeModel.load(bundle, threads=1)
    decoder = FakeDecoder(standin.HIDDEN, standin.VOCAB)
    return EdgeModel(loaded.manifest, loaded.vision, loaded.chat, loaded.embedding, decoder, 4000, load_sec=0.0)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """A watch that was left or closed has ended its threads."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("vz-edge-watch"):
            thread.join(PATIENCE_SEC)
            assert not thread.is_alive(), thread.name
