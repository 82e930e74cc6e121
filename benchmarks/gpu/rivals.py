"""The bundles of the stage "headline" and of those that build on it, and making them."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

from benchmarks.gpu.random_bundle import make_bundle
from benchmarks.gpu.stage import Settings
from benchmarks.make_checkpoint import model_of_shape
from vz_edge.bundle import MANIFEST, WeightSpec, default_weights
from vz_edge.recipe import ModelSpec

CORES_PER_BUNDLE = 2


class Rival(NamedTuple):
    """A model of the headline's shapes with so many bits and image tokens (None: all)."""

    size: Literal["13B", "7B"]
    bits: Literal[4, 8, 16]
    tokens: int | None

    @property
    def name(self) -> str:
        """For tables and folders: ``13B-4bit-320``."""
        return f"{self.size}-{self.bits}bit-{self.tokens or 'all'}"

    @property
    def weights(self) -> WeightSpec:
        """As an export stores them unless told otherwise."""
        return default_weights(self.bits)

    def shape(self, settings: Settings) -> str:
        """What make_checkpoint.py calls it."""
        return settings.large if self.size == "13B" else settings.small

    def model(self, settings: Settings) -> ModelSpec:
        """Its architecture."""
        return model_of_shape(self.shape(settings))

    def folder(self, settings: Settings) -> Path:
        """Where its bundle lies, or will."""
        return Path(settings.work) / f"{settings.shape}-{self.name}"


LARGE = Rival("13B", 4, 320)
SMALL_VANILLA = Rival("7B", 16, None)
SMALL_REDUCED = Rival("7B", 4, 160)
SMALL_ALL = Rival("7B", 4, None)
RIVALS = (LARGE, SMALL_VANILLA, SMALL_REDUCED, SMALL_ALL)


def make(rival: Rival, settings: Settings) -> Path:
    """The rival's bundle, made now if it is not there."""
    folder = rival.folder(settings)
    if not (folder / MANIFEST).exists():
        make_bundle(rival.shape(settings), folder, rival.weights, str(rival.tokens or "all"), "cuda")
    return folder


def make_all(rivals: tuple[Rival, ...], settings: Settings) -> None:
    """All of them, side by side where there are processors for it."""
    workers = min(len(rivals), (os.cpu_count() or 1) // CORES_PER_BUNDLE)
    if workers < 2:
        for rival in rivals:
            make(rival, settings)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for done in [pool.submit(make, rival, settings) for rival in rivals]:
            done.result()
