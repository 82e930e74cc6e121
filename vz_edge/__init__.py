"""vz-edge: LLaVA models with VisionZip token selection and 4-bit weights, exported once, run on edge devices.

>>> from vz_edge import EdgeModel
>>> model = EdgeModel.load("bundles/llava-next-13b")
>>> print(model.ask("street.jpg", "What is to the left of the bus?").text)

All but the errors is imported when first used: ``import vz_edge`` costs milliseconds and loads no runtime.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from vz_edge.errors import (
    AnswerError,
    BudgetError,
    BundleError,
    BundleVersionError,
    CheckpointError,
    CompressionError,
    ContextLengthError,
    CorruptBundleError,
    DependencyError,
    DeviceError,
    DiskSpaceError,
    ExportError,
    ImageError,
    InsufficientMemoryError,
    MeasurementError,
    MissingTensorError,
    ProviderError,
    RecipeError,
    RequestError,
    ServeError,
    SourceError,
    TargetExistsError,
    TensorShapeError,
    UnsafeCheckpointError,
    UnsupportedModelError,
    VzEdgeError,
)

if TYPE_CHECKING:
    from vz_edge.device.guide import Lark
    from vz_edge.device.model import EdgeModel
    from vz_edge.device.reply import Reply, Stream
    from vz_edge.device.session import Session
    from vz_edge.device.vision import VisionResult
    from vz_edge.host.compress import compress, restore

__version__ = "0.1.0"

__all__ = [
    "AnswerError",
    "BudgetError",
    "BundleError",
    "BundleVersionError",
    "CheckpointError",
    "CompressionError",
    "ContextLengthError",
    "CorruptBundleError",
    "DependencyError",
    "DeviceError",
    "DiskSpaceError",
    "EdgeModel",
    "ExportError",
    "ImageError",
    "InsufficientMemoryError",
    "Lark",
    "MeasurementError",
    "MissingTensorError",
    "ProviderError",
    "RecipeError",
    "Reply",
    "RequestError",
    "ServeError",
    "Session",
    "SourceError",
    "Stream",
    "TargetExistsError",
    "TensorShapeError",
    "UnsafeCheckpointError",
    "UnsupportedModelError",
    "VisionResult",
    "VzEdgeError",
    "compress",
    "restore",
]

_LAZY = {
    "EdgeModel": "vz_edge.device.model",
    "Lark": "vz_edge.device.guide",
    "Reply": "vz_edge.device.reply",
    "Session": "vz_edge.device.session",
    "Stream": "vz_edge.device.reply",
    "VisionResult": "vz_edge.device.vision",
    "compress": "vz_edge.host.compress",
    "restore": "vz_edge.host.compress",
}


# What the package does is logged under this name; who runs it says where that goes (docs.python.org, "Configuring
# Logging for a Library").
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vz_edge' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
