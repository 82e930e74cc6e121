"""Encoded pictures, kept by what is in them: the hash of their pixels, and the token budget.

One that is in use elsewhere, in a KV cache that is kept, is found for as long as it is used there: so the same picture
is always the same object, by which ``prefix_cache`` knows it.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from dataclasses import replace
from typing import NamedTuple

from PIL import Image

from vz_edge.budget import TokenBudget
from vz_edge.device.vision import VisionResult


class PictureKey(NamedTuple):
    """What an encoded picture depends on, for one model."""

    size: tuple[int, int]
    digest: bytes
    budget: TokenBudget | None


def picture_key(image: Image.Image, budget: TokenBudget | None) -> PictureKey:
    """The key of a picture in RGB, as ``load_image`` gives it. BLAKE2b (RFC 7693): nobody can make two of one hash."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=32).digest()
    return PictureKey(image.size, digest, budget)


class PictureCache:
    """Encoded pictures, no more than ``max_bytes`` of them; the least recently used are let go.

    Safe to share between threads.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[PictureKey, VisionResult] = {}  # the least recently used first
        self._in_use: weakref.WeakValueDictionary[PictureKey, VisionResult] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Memory of the pictures that are kept here."""
        return sum(picture.size_bytes for picture in tuple(self._kept.values()))

    def get(self, key: PictureKey) -> VisionResult | None:
        """The picture of that key, if it is kept or in use."""
        with self._lock:
            picture = self._in_use.get(key)
            if picture is not None:
                self._keep(key, picture)
            return picture

    def put(self, key: PictureKey, picture: VisionResult) -> VisionResult:
        """Keep ``picture``, in the place of others where need be, unless it is too large by itself.

        Returns it in memory of its own: ONNX Runtime's arrays lie among its activations, and hold these back.
        """
        owned = _copy(picture)
        with self._lock:
            self._in_use[key] = owned
            self._keep(key, owned)
        return owned

    def clear(self) -> None:
        """Let go of all that is kept."""
        with self._lock:
            self._kept.clear()

    def _keep(self, key: PictureKey, picture: VisionResult) -> None:
        self._kept.pop(key, None)
        if picture.size_bytes > self._max_bytes:
            return
        self._kept[key] = picture
        while self.size_bytes > self._max_bytes:
            del self._kept[next(iter(self._kept))]


def _copy(picture: VisionResult) -> VisionResult:
    kept, scores, merged = (
        None if array is None else array.copy() for array in (picture.kept, picture.scores, picture.merged)
    )
    return replace(picture, features=picture.features.copy(), kept=kept, scores=scores, merged=merged)
