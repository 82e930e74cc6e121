"""Which runtimes a bundle needs, whether this machine has them, and on which processor.

Chosen before anything is loaded, so that a missing package, a GPU that is not there or too little memory is known at
once. This is the only place of the device side that reaches for torch, and only for a bundle with bitsandbytes weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from vz_edge.bundle import Manifest
from vz_edge.device.decoder import Decoder
from vz_edge.device.onnx_decoder import OnnxDecoder
from vz_edge.device.runtime import choose_providers
from vz_edge.device.vision import Vision, VisionEncoder
from vz_edge.errors import RequestError

VisionRuntime = Literal["onnx", "torch"]


class Backend(Protocol):
    """What runs a bundle's two halves. ``provider`` is ONNX Runtime's name of the processor whose memory it takes."""

    @property
    def provider(self) -> str:
        """CPUExecutionProvider, CUDAExecutionProvider..."""

    def open(self, folder: Path, threads: int | None) -> Decoder:
        """Load the language model of the bundle in ``folder``. Raises BundleError or ProviderError."""

    def open_vision(self, folder: Path, manifest: Manifest, threads: int | None) -> Vision:
        """Load what looks at pictures. Raises BundleError or ProviderError."""


@dataclass(frozen=True)
class OnnxBackend:
    """vision.onnx and decoder.onnx on the first of ``providers`` that takes them."""

    providers: tuple[str, ...]

    @property
    def provider(self) -> str:
        """The provider that is preferred."""
        return self.providers[0]

    def open(self, folder: Path, threads: int | None) -> Decoder:
        """As Backend.open."""
        return OnnxDecoder.open(folder, self.providers, threads)

    def open_vision(self, folder: Path, manifest: Manifest, threads: int | None) -> Vision:
        """As Backend.open_vision."""
        return VisionEncoder.open(folder, manifest, self.providers, threads)


def choose_backend(folder: Path, manifest: Manifest, providers: Sequence[str] | None, vision: VisionRuntime) -> Backend:
    """The backend of a bundle; ``providers`` and ``vision`` as in ``EdgeModel.load``.

    Raises DependencyError where a package is missing, ProviderError where a processor or a kernel is, RequestError
    where the bundle's vision does not run in ``vision``.
    """
    if vision not in ("onnx", "torch"):
        raise RequestError(f"vision {vision!r} is unknown; expected 'onnx' (ONNX Runtime) or 'torch'")
    if vision == "torch" and manifest.format != "bnb":
        raise RequestError(
            f"{folder} runs in ONNX Runtime alone, so its vision does not run in torch; leave vision='torch' out "
            "(--vision), or export with --format bnb"
        )
    if manifest.format == "bnb":
        # torch and transformers are loaded here, and nowhere else on the device side.
        from vz_edge.backends.transformers_backend import TransformersBackend

        return TransformersBackend.choose(folder, providers, manifest, vision)
    return OnnxBackend(tuple(choose_providers(providers, manifest.target)))
