"""Vision in torch: what ``vision.onnx`` computes, with its weights, on the language model's device.

For machines whose onnxruntime has no CUDA and whose torch has it. The weights come out of ``vision.onnx`` itself, so
that a bundle holds them once. Layers are transformers', and what comes after the tower is what ``vz_edge.compress``
runs: the functions that the graph was traced from. On a processor the weights stay in their file, mapped, as they do
with ONNX Runtime.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from vz_edge.backends.graph_weights import read_weights
from vz_edge.budget import TokenBudget
from vz_edge.bundle import Manifest
from vz_edge.device.image import ImageSource, Tiles, load_image, make_tiles, vanilla_token_order
from vz_edge.device.mapped import MappedWeights
from vz_edge.device.memory_check import QUESTION_TOKENS, memory_need, release_rule, spare_memory_bytes
from vz_edge.device.process import one_line
from vz_edge.device.vision import VisionResult, log_look
from vz_edge.errors import CorruptBundleError
from vz_edge.host.compressed_model import Compression, reduced_features, tower_states
from vz_edge.recipe import ModelSpec

TRANSPOSED = ".transposed"  # the graph multiplies with [inputs, outputs]


class VisionPath(nn.Module):
    """Tower, projector and, in a family with a grid, the newline embedding, under transformers' names."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        tower, width = model.tower, model.decoder.hidden_size
        config = CLIPVisionConfig(
            hidden_size=tower.hidden_size,
            intermediate_size=tower.intermediate_size,
            num_hidden_layers=tower.layers_before(model.feature_layer),
            num_attention_heads=tower.heads,
            image_size=tower.image_size,
            patch_size=tower.patch_size,
            hidden_act=tower.activation,
            layer_norm_eps=tower.layer_norm_eps,
        )
        clip = CLIPVisionModel(config)
        self.vision_tower = getattr(clip, "vision_model", clip)  # one level deeper in early releases of transformers 5
        self.vision_tower.post_layernorm = nn.Identity()  # beyond the feature layer
        self.multi_modal_projector = nn.Sequential(
            OrderedDict(
                linear_1=nn.Linear(model.feature_width, width, bias=model.projector_bias),
                gelu=nn.GELU(),
                linear_2=nn.Linear(width, width, bias=model.projector_bias),
            )
        )
        self.image_newline = nn.Parameter(torch.empty(width)) if model.grid_pinpoints else None


class TorchVision:
    """``path`` as a Vision; safe to use from several threads.

    ``weights`` are what it leaves mapped; their pages are given back after a picture where ``release`` says so.
    """

    def __init__(
        self, path: VisionPath, weights: MappedWeights, manifest: Manifest, release: Callable[[], bool]
    ) -> None:
        self._path = path
        self._weights = weights
        self._release = release
        self._model, self._image = manifest.model, manifest.image
        self._budget = manifest.budget

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, device: str, release_memory: bool | None = None) -> TorchVision:
        """Take the weights of the bundle's vision graph; ``release_memory`` as in ``EdgeModel.load``.

        Raises CorruptBundleError.

        They are float32 on the CPU, where products in fp16 are slow, and in the graph's precision on CUDA.
        """
        file = folder / "vision.onnx"
        weights = read_weights(file)
        try:
            with init_empty_weights(include_buffers=False):
                path = VisionPath(manifest.model)
            path.load_state_dict(_in_transformers_terms(weights), assign=True)
        except Exception as error:  # each check in transformers has its own exception; torch's is RuntimeError
            reason = str(error).removeprefix("Error(s) in loading state_dict for VisionPath:")
            raise CorruptBundleError(
                f"{file} has not the weights that the manifest describes ({one_line(reason)}); copy or export the "
                "bundle again"
            ) from error
        path = path.requires_grad_(False).eval().to(device, torch.float32 if device == "cpu" else None)
        mapped = MappedWeights(folder / "vision.onnx.data")
        if device == "cuda":
            mapped.release()  # they were copied
            return cls(path, mapped, manifest, lambda: False)
        spare_bytes = spare_memory_bytes(memory_need(folder, manifest, QUESTION_TOKENS))
        return cls(path, mapped, manifest, release_rule(spare_bytes, release_memory))

    def tile(self, source: ImageSource) -> Tiles:
        """As Vision.tile."""
        return make_tiles(load_image(source), self._model, self._image)

    @torch.inference_mode()
    def encode(self, tiles: Tiles, budget: TokenBudget | None = None) -> VisionResult:
        """As Vision.encode."""
        log_look(tiles)
        weight = self._path.multi_modal_projector.get_parameter("linear_1.weight")
        pixel_values = torch.from_numpy(tiles.pixel_values).to(weight.device, weight.dtype)
        budget = budget or self._budget
        if budget is None:
            features, kept = self._all_features(pixel_values, tiles), None
        else:
            columns = 1 if tiles.grid is None else tiles.grid[0]
            compression = _compression(self._model, budget)
            found = reduced_features(self._path, compression, pixel_values, [len(pixel_values)], [columns])
            features, kept = found.pooler_output[0], _numpy(found.kept[0])  # type: ignore[index]
        result = VisionResult(_numpy(features), kept, tiles.grid, tiles.original_size)
        if self._release():
            self._weights.release()
        return result

    def _all_features(self, pixel_values: Tensor, tiles: Tiles) -> Tensor:
        """Features [tokens, hidden] of all patches, in transformers' order."""
        hidden, _, _ = tower_states(self._path.vision_tower, pixel_values, self._model.states_read)
        tokens = hidden if self._model.cls_is_token else hidden[:, 1:]
        features: Tensor = self._path.multi_modal_projector(tokens.flatten(0, 1))
        if tiles.grid is None or self._path.image_newline is None:
            return features
        order = vanilla_token_order(tiles.original_size, tiles.grid, self._model.tower.patches_per_side)
        rows = torch.cat([features, self._path.image_newline[None]])
        return rows[torch.from_numpy(order).to(rows.device)]


def _compression(model: ModelSpec, budget: TokenBudget) -> Compression:
    total = budget.total(model.max_tiles)
    return Compression(model.family, model.tower, model.states_read, model.grid_pinpoints, total, budget)


def _in_transformers_terms(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The graph's weights under the names and in the shapes of VisionPath; constants of the graph are left out."""
    found = {}
    for name, tensor in weights.items():
        if name.endswith(TRANSPOSED):
            found[f"{name.removesuffix(TRANSPOSED)}.weight"] = tensor.T
        elif name == "image_newline":
            found[name] = tensor[0]
        elif name.startswith(("vision_tower.", "multi_modal_projector.")):
            found[name] = tensor
    return found


def _numpy(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.cpu().numpy()
    return found
