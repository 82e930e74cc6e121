"""Memory that a picture took is given back where somebody needs it, or says so, and kept otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vz_edge.bundle import read_manifest
from vz_edge.device import memory_check, vision
from vz_edge.device.memory_check import QUESTION_TOKENS, SPARE_BYTES, memory_need, spare_memory_bytes
from vz_edge.device.model import EdgeModel
from vz_edge.errors import RequestError

SHRINKAGE = "memory.enable_memory_arena_shrinkage"
PICTURE = np.zeros((40, 50, 3), np.uint8)


class Spy:
    """Says whether weights were left mapped, and what each picture gave back: activations, weights."""

    def __init__(self) -> None:
        self.mapped: bool | None = None
        self.released: list[tuple[bool, bool]] = []


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    found = Spy()
    weights = [0]

    class Session:
        def __init__(self, session: Any) -> None:
            self._session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def run(self, outputs: Any, feeds: Any, options: Any) -> Any:
            found.released.append((options is not None and options.get_run_config_entry(SHRINKAGE) == "cpu:0", False))
            return self._session.run(outputs, feeds, options)

    class Weights:
        def __init__(self, file: Path) -> None:
            self.file = file

        def release(self) -> None:
            weights[0] += 1
            if found.released:
                found.released[-1] = (found.released[-1][0], True)

    opened = vision.open_session

    def open_session(file: Path, providers: Any, threads: Any, leave_mapped: bool) -> Session:
        found.mapped = leave_mapped
        return Session(opened(file, providers, threads, leave_mapped))

    monkeypatch.setattr(vision, "open_session", open_session)
    monkeypatch.setattr(vision, "MappedWeights", Weights)
    yield found


def available(monkeypatch: pytest.MonkeyPatch, size_bytes: int | None) -> None:
    monkeypatch.setattr(memory_check, "available_memory_bytes", lambda provider: size_bytes)


def test_what_is_asked_for_holds_whatever_the_machine_has(
    bundle: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size_bytes in (0, 10**15, None):
        for release in (True, False):
            spy.released.clear()
            monkeypatch.setattr("vz_edge.device.model.available_memory_bytes", lambda provider: None)
            available(monkeypatch, size_bytes)
            model = EdgeModel.load(bundle, threads=1, release_memory=release)
            for _ in range(2):
                model.encode(PICTURE)
            assert spy.mapped is release and spy.released == [(release, release)] * 2


def test_by_default_it_follows_the_memory_that_is_available(
    bundle: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(bundle)
    need = memory_need(bundle, manifest, QUESTION_TOKENS)
    spare = spare_memory_bytes(need)
    assert spare == need.vision_bytes + need.cache_bytes + SPARE_BYTES
    monkeypatch.setattr("vz_edge.device.model.available_memory_bytes", lambda provider: None)
    for size_bytes, mapped in ((need.total_bytes + spare, False), (need.total_bytes + spare - 1, True), (None, False)):
        available(monkeypatch, size_bytes)
        model = EdgeModel.load(bundle, threads=1)
        assert spy.mapped is mapped
        spy.released.clear()
        for left in (spare, spare - 1, spare, None):
            available(monkeypatch, left)
            model.encode(PICTURE)
        assert spy.released == [(False, False), (True, True), (False, False), (False, False)]


def test_the_tokens_are_the_same(bundle: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    kept, released = (EdgeModel.load(bundle, threads=1, release_memory=release) for release in (False, True))
    for _ in range(2):
        np.testing.assert_array_equal(kept.encode(pixels).features, released.encode(pixels).features)


def test_a_question_of_a_large_model_finds_room(bundle: Path) -> None:
    manifest = dataclasses.replace(read_manifest(bundle), predicted={"kv_cache_bytes_per_token": 1_600_000})
    assert spare_memory_bytes(memory_need(bundle, manifest, QUESTION_TOKENS)) > 1024 * 1_600_000


def test_anything_else_is_refused(bundle: Path) -> None:
    with pytest.raises(RequestError, match="release_memory 'auto' is impossible; expected True or False"):
        EdgeModel.load(bundle, release_memory="auto")  # type: ignore[arg-type]
