from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.device import standin
from tests.serve.asking import ScriptedModel
from vz_edge.device.model import EdgeModel
from vz_edge.serve.engine import Engine


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "bundle"
    standin.write_bundle(folder)
    return folder


@pytest.fixture(scope="session")
def model(bundle: Path) -> EdgeModel:
    return EdgeModel.load(bundle, threads=1)


@pytest.fixture(scope="session")
def engine(model: EdgeModel) -> Iterator[Engine]:
    engine = Engine(model, queue_length=16, cache_bytes=2**24)
    engine.start()
    yield engine
    assert engine.stop(10)


@pytest.fixture
def scripted(model: EdgeModel) -> ScriptedModel:
    return ScriptedModel(model)


@pytest.fixture
def scripted_engine(scripted: ScriptedModel) -> Iterator[Engine]:
    """An engine with one place in the queue, over a model whose pieces the test lets go."""
    engine = Engine(scripted, queue_length=1)  # type: ignore[arg-type]
    engine.start()
    yield engine
    scripted.let_go(1000)
    assert engine.stop(10)
