"""What looks at pictures: tiles in, the picture's tokens out. Here it is the vision graph's session.

``vision.onnx`` holds tower, token selection and projector. With a budget it also says which positions of each
tile it kept (0 is CLS, patch p is p + 1), which is what the pictures of kept tokens are drawn from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vz_edge.arguments import shown
from vz_edge.budget import TokenBudget
from vz_edge.bundle import Manifest
from vz_edge.device.heap import give_back_freed_memory
from vz_edge.device.image import ImageSource, Tiles, load_image, make_tiles, vanilla_token_order
from vz_edge.device.mapped import MappedWeights
from vz_edge.device.memory_check import QUESTION_TOKENS, is_short, memory_need, release_rule, spare_memory_bytes
from vz_edge.device.runtime import CPU, Provider, import_onnxruntime, open_session, provider_name
from vz_edge.errors import CorruptBundleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxruntime import InferenceSession

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class VisionResult:
    """A picture as the decoder takes it.

    ``features`` is [tokens, hidden], float32 or float16; ``kept`` int64 [tiles, dominant] or None without a budget;
    ``grid`` (columns, rows) or None; ``original_size`` (width, height) in pixels.

    Why these were kept: ``scores`` float32 [tiles, p] is the attention of CLS to each patch, summed over heads, and
    ``merged`` int64 [tiles, 1 + p] the contextual token that each position went into, -1 for kept ones. Both are None
    without a budget, where vision runs in torch, and of bundles whose vision graph does not tell.
    """

    features: np.ndarray
    kept: np.ndarray | None
    grid: tuple[int, int] | None
    original_size: tuple[int, int]
    scores: np.ndarray | None = None
    merged: np.ndarray | None = None

    @property
    def size_bytes(self) -> int:
        """Memory that its arrays take."""
        arrays = (self.features, self.kept, self.scores, self.merged)
        return sum(array.nbytes for array in arrays if array is not None)

    def __repr__(self) -> str:
        names = ("features", "kept", "scores", "merged")
        arrays = {name: getattr(self, name) for name in names}
        written = [f"{name}={_array_repr(array)}" for name, array in arrays.items() if array is not None]
        return f"VisionResult({', '.join(written)}, grid={self.grid}, original_size={self.original_size})"


def _array_repr(array: object) -> str:
    return f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else shown(array)


class Vision(Protocol):
    """Encodes pictures for one model; safe to use from several threads."""

    def tile(self, source: ImageSource) -> Tiles:
        """Load a picture and tile it for this model. Raises ImageError."""

    def encode(self, tiles: Tiles, budget: TokenBudget | None = None) -> VisionResult:
        """Look at a picture's tiles. ``budget`` is one of the bundle's several, by default the first."""


def input_names(manifest: Manifest) -> set[str]:
    """What the vision graph of such a bundle takes (docs/bundle.md)."""
    names = {"pixel_values"}
    if manifest.model.family != "llava":  # a family with a grid
        names.add("grid_width" if manifest.budgets else "token_order")
    if manifest.more_budgets:
        names.add("budget")
    return names


def log_look(tiles: Tiles) -> None:
    """Say in the log what is looked at now."""
    width, height = tiles.original_size
    logger.info("looking at a picture of %d x %d pixels, %d tile(s)", width, height, len(tiles.pixel_values))


class VisionEncoder:
    """Runs ``vision.onnx`` in ONNX Runtime; safe to use from several threads.

    On the CPU a picture's activations and the tower's weights are memory that the decoder, which runs next, could use.
    Giving it back costs a third of the speed, since the next picture has to ask the system for every page anew; so it
    is given back where ``release`` says so, which is asked before each picture. ``weights`` are what is left mapped.
    """

    def __init__(
        self, session: InferenceSession, weights: MappedWeights, manifest: Manifest, release: Callable[[], bool]
    ) -> None:
        self._session = session
        self._weights = weights
        self._model, self._image, self._budgets = manifest.model, manifest.image, manifest.budgets
        self._inputs = {value.name for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]
        self._release = release
        self._shrinking = import_onnxruntime().RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    @classmethod
    def open(
        cls,
        folder: Path,
        manifest: Manifest,
        providers: Sequence[Provider],
        threads: int | None,
        release_memory: bool | None = None,
    ) -> VisionEncoder:
        """Open the bundle's vision graph; ``release_memory`` as in ``EdgeModel.load``.

        Raises CorruptBundleError or ProviderError.
        """
        on_cpu = provider_name(providers[0]) == CPU
        need = memory_need(folder, manifest, QUESTION_TOKENS)
        spare_bytes = spare_memory_bytes(need)
        keeps = not on_cpu or release_memory is False
        if on_cpu and release_memory is None:  # nothing is loaded yet
            keeps = not is_short(need.total_bytes + spare_bytes)
        # Float weights may lie in their file, whose pages can be given back; repacked they are a tenth faster
        # (measured: CLIP-L, one tile). Quantised ones must be repacked.
        leave_mapped = not keeps and manifest.weights.vision_bits == 16
        file = folder / "vision.onnx"
        session = open_session(file, providers, threads, leave_mapped)
        found = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
        expected = input_names(manifest)
        if found != expected:
            raise CorruptBundleError(
                f"{file} takes {', '.join(sorted(found))} and the manifest's family {manifest.model.family} with "
                f"{len(manifest.budgets)} budgets gives {', '.join(sorted(expected))}: they do not belong together; "
                "copy or export the bundle again"
            )
        weights = MappedWeights(folder / "vision.onnx.data")
        if not leave_mapped:
            weights.release()  # what repacking left mapped
        return cls(session, weights, manifest, release_rule(spare_bytes, release_memory if on_cpu else False))

    def tile(self, source: ImageSource) -> Tiles:
        """As Vision.tile."""
        return make_tiles(load_image(source), self._model, self._image)

    def encode(self, tiles: Tiles, budget: TokenBudget | None = None) -> VisionResult:
        """As Vision.encode."""
        feeds = self._feeds(tiles)
        if budget is not None and len(self._budgets) > 1:
            feeds["budget"] = np.array([self._budgets.index(budget)])
        log_look(tiles)
        release = self._release()
        found = self._session.run(self._outputs, feeds, self._shrinking if release else None)
        if release:
            self._weights.release()
            give_back_freed_memory()
            logger.debug("gave back what the picture took of memory")
        outputs = dict(zip(self._outputs, found, strict=True))
        return VisionResult(
            outputs["image_features"],
            outputs.get("kept"),
            tiles.grid,
            tiles.original_size,
            outputs.get("scores"),
            outputs.get("merged"),
        )

    def _feeds(self, tiles: Tiles) -> dict[str, np.ndarray]:
        feeds = {"pixel_values": tiles.pixel_values}
        if tiles.grid is not None and "grid_width" in self._inputs:
            feeds["grid_width"] = np.array([tiles.grid[0]], dtype=np.int64)
        if tiles.grid is not None and "token_order" in self._inputs:
            side = self._model.tower.patches_per_side
            feeds["token_order"] = vanilla_token_order(tiles.original_size, tiles.grid, side)
        return feeds
