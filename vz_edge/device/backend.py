"""Which runtimes a bundle needs, whether this machine has them, and on which processor.

Chosen before anything is loaded, so that a missing package, a GPU that is not there or too little memory is known at
once. This is the only place of the device side that reaches for torch, and only for a bundle with bitsandbytes weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

from vz_edge.arguments import one_of
from vz_edge.bundle import Manifest
from vz_edge.device.cuda_graph import GraphDecoder
from vz_edge.device.decoder import Decoder
from vz_edge.device.onnx_decoder import OnnxDecoder, open_decoder_session
from vz_edge.device.runtime import CUDA, Provider, choose_providers, provider_name
from vz_edge.device.vision import Vision, VisionEncoder
from vz_edge.errors import ProviderError, RequestError

VisionRuntime = Literal["onnx", "torch"]


class Backend(Protocol):
    """What runs a bundle's two halves. ``provider`` is ONNX Runtime's name of the processor whose memory it takes."""

    @property
    def provider(self) -> Provider:
        """CPUExecutionProvider, CUDAExecutionProvider..., with its options where it has any."""

    @property
    def vision_providers(self) -> tuple[Provider, ...] | None:
        """ONNX Runtime's, of what looks at pictures; None where torch does."""

    def open(self, folder: Path, threads: int | None) -> Decoder:
        """Load the language model of the bundle in ``folder``. Raises BundleError or ProviderError."""

    def open_vision(
        self, folder: Path, manifest: Manifest, threads: int | None, release_memory: bool | None = None
    ) -> Vision:
        """Load what looks at pictures; ``release_memory`` as in ``EdgeModel.load``.

        Raises BundleError or ProviderError.
        """


@dataclass(frozen=True)
class OnnxBackend:
    """vision.onnx and decoder.onnx on the first of ``providers`` that takes them.

    A context of up to ``graph_tokens`` tokens decodes by a CUDA graph; 0: none. Vision, whose shapes change with the
    picture, has none.
    """

    providers: tuple[Provider, ...]
    graph_tokens: int = 0

    @property
    def provider(self) -> Provider:
        """The provider that is preferred."""
        return self.providers[0]

    @property
    def vision_providers(self) -> tuple[Provider, ...]:
        """Those of both halves."""
        return self.providers

    def open(self, folder: Path, threads: int | None) -> Decoder:
        """As Backend.open."""
        if self.graph_tokens:
            session = open_decoder_session(folder, self.providers, threads, cuda_graph=True)
            return GraphDecoder(session, self.graph_tokens)
        return OnnxDecoder.open(folder, self.providers, threads)

    def open_vision(
        self, folder: Path, manifest: Manifest, threads: int | None, release_memory: bool | None = None
    ) -> Vision:
        """As Backend.open_vision."""
        return VisionEncoder.open(folder, manifest, self.providers, threads, release_memory)


def choose_backend(
    folder: Path,
    manifest: Manifest,
    providers: Provider | Sequence[Provider] | None,
    vision: VisionRuntime,
    graph_tokens: int = 0,
    device: int | None = None,
) -> Backend:
    """The backend of a bundle; ``graph_tokens`` as in OnnxBackend, all else as in ``EdgeModel.load``.

    Raises DependencyError where a package is missing, ProviderError where a processor or a kernel is or a CUDA graph
    is wanted of another provider, and RequestError where the bundle's vision does not run in ``vision`` or its
    language model by a CUDA graph.
    """
    one_of("vision", vision, get_args(VisionRuntime))
    if vision == "torch" and manifest.format != "bnb":
        raise RequestError(
            f"{folder} runs in ONNX Runtime alone, so its vision does not run in torch; leave vision='torch' out "
            "(--vision), or export with --format bnb"
        )
    if manifest.format == "bnb":
        if graph_tokens:
            raise RequestError(
                f"{folder} runs its language model in torch, which decodes without a CUDA graph; leave cuda_graph "
                "out, or export with --format onnx"
            )
        # torch and transformers are loaded here, and nowhere else on the device side.
        from vz_edge.backends.transformers_backend import TransformersBackend

        return TransformersBackend.choose(folder, providers, manifest, vision, device)
    chosen = tuple(choose_providers(providers, manifest.target, device))
    if graph_tokens and provider_name(chosen[0]) != CUDA:
        raise ProviderError(
            f"{folder} would run on {provider_name(chosen[0])}, where there are no CUDA graphs; leave cuda_graph out, "
            "or run a bundle of --target cuda on CUDA"
        )
    return OnnxBackend(chosen, graph_tokens)
