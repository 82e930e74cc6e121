"""The vision graph's session: tiles in, the picture's tokens out.

``vision.onnx`` holds tower, token selection and projector. With a budget it also says which positions of each
tile it kept (0 is CLS, patch p is p + 1), which is what the pictures of kept tokens are drawn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vz_edge.bundle import ImageSpec, Manifest
from vz_edge.device.image import ImageSource, Tiles, load_image, make_tiles, vanilla_token_order
from vz_edge.device.mapped import MappedWeights
from vz_edge.device.runtime import CPU, import_onnxruntime, open_session
from vz_edge.recipe import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxruntime import InferenceSession


@dataclass(frozen=True)
class VisionResult:
    """A picture as the decoder takes it.

    ``features`` is [tokens, hidden] in the graph's precision; ``kept`` int64 [tiles, dominant] or None without a
    budget; ``grid`` (columns, rows) or None; ``original_size`` (width, height) in pixels.
    """

    features: np.ndarray
    kept: np.ndarray | None
    grid: tuple[int, int] | None
    original_size: tuple[int, int]


class VisionEncoder:
    """Runs ``vision.onnx``; safe to use from several threads. ``weights`` are what it leaves mapped."""

    def __init__(self, session: InferenceSession, weights: MappedWeights, model: ModelSpec, image: ImageSpec) -> None:
        self._session = session
        self._weights = weights
        self._model = model
        self._image = image
        self._inputs = {value.name for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]
        self._run_options = import_onnxruntime().RunOptions()
        if session.get_providers()[0] == CPU:
            # A picture's activations are hundreds of MB that the decoder, which runs next, could use.
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, providers: Sequence[str], threads: int | None) -> VisionEncoder:
        """Open the bundle's vision graph. Raises CorruptBundleError or ProviderError."""
        # Quantised layers must be repacked for the processor; float ones are as fast where they lie.
        leave_mapped = providers[0] == CPU and manifest.weights.vision_bits == 16
        session = open_session(folder / "vision.onnx", providers, threads, leave_mapped)
        weights = MappedWeights(folder / "vision.onnx.data")
        return cls(session, weights, manifest.model, manifest.image)

    def tile(self, source: ImageSource) -> Tiles:
        """Load a picture and tile it for this model. Raises ImageError."""
        return make_tiles(load_image(source), self._model, self._image)

    def encode(self, tiles: Tiles) -> VisionResult:
        """Run the graph on a picture's tiles."""
        found = self._session.run(self._outputs, self._feeds(tiles), self._run_options)
        self._weights.release()
        outputs = dict(zip(self._outputs, found, strict=True))
        return VisionResult(outputs["image_features"], outputs.get("kept"), tiles.grid, tiles.original_size)

    def _feeds(self, tiles: Tiles) -> dict[str, np.ndarray]:
        feeds = {"pixel_values": tiles.pixel_values}
        if tiles.grid is not None and "grid_width" in self._inputs:
            feeds["grid_width"] = np.array([tiles.grid[0]], dtype=np.int64)
        if tiles.grid is not None and "token_order" in self._inputs:
            side = self._model.tower.patches_per_side
            feeds["token_order"] = vanilla_token_order(tiles.original_size, tiles.grid, side)
        return feeds
