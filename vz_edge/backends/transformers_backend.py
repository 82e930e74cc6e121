"""Bundles with bitsandbytes weights: whether this machine can run one, on which processor, and loading it.

The language model runs in transformers; vision in ONNX Runtime, or in torch beside the language model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vz_edge.arguments import whole
from vz_edge.backends.bitsandbytes_trial import fault, kernel_trial
from vz_edge.bundle import LANGUAGE_MODEL, Manifest
from vz_edge.device.backend import VisionRuntime
from vz_edge.device.decoder import Decoder
from vz_edge.device.dependencies import require_imports, require_installed
from vz_edge.device.process import one_line
from vz_edge.device.requirements import install_command
from vz_edge.device.runtime import (
    CPU,
    CUDA,
    DEVICE_ID,
    Provider,
    choose_providers,
    device_of,
    listed_providers,
    provider_name,
)
from vz_edge.device.vision import Vision, VisionEncoder
from vz_edge.errors import CorruptBundleError, DependencyError, ProviderError

PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate")
Device = Literal["cpu", "cuda"]
# ONNX Runtime's providers by their short names, and the device of torch that each stands for.
DEVICES: dict[str, Device] = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda"}


@dataclass(frozen=True)
class TransformersBackend:
    """transformers and bitsandbytes on ``device``; vision on ONNX Runtime's ``vision_providers``, None: torch.

    ``device_id`` is the number of the GPU, as CUDA counts.
    """

    device: Device
    vision_providers: tuple[Provider, ...] | None = None
    device_id: int = 0

    @property
    def provider(self) -> Provider:
        """ONNX Runtime's name of the device, with the number of the GPU where it is not the first."""
        if self.device == "cpu":
            return CPU
        return (CUDA, {DEVICE_ID: str(self.device_id)}) if self.device_id else CUDA

    @property
    def torch_device(self) -> str:
        """Torch's name of the device, as "cuda:0"."""
        return f"cuda:{self.device_id}" if self.device == "cuda" else "cpu"

    @classmethod
    def choose(
        cls,
        folder: Path,
        providers: Provider | Sequence[Provider] | None,
        manifest: Manifest,
        vision: VisionRuntime,
        device_id: int | None = None,
    ) -> TransformersBackend:
        """Check packages, kernels and files. Raises DependencyError, ProviderError and CorruptBundleError."""
        require_packages(f"{folder} has bitsandbytes weights, and running them")
        from vz_edge.backends.language_model_files import check_language_model

        device = choose_device(providers, manifest.target)
        number = choose_device_id(providers, device, device_id)
        # Where vision runs on the CPU, the number is the language model's alone.
        vision_providers = None if vision == "torch" else _vision_providers(providers, manifest.target)
        if vision_providers is not None and provider_name(vision_providers[0]) != CPU and number:
            vision_providers = tuple(choose_providers(vision_providers, manifest.target, number))
        chosen = cls(device, vision_providers, number)
        require_kernel(manifest.weights.bits, chosen.torch_device)
        check_language_model(folder / LANGUAGE_MODEL, manifest)
        return chosen

    def open(self, folder: Path, threads: int | None) -> Decoder:
        """Load the language model; ``threads`` are torch's, of the whole process."""
        import torch

        from vz_edge.backends.transformers_decoder import TransformersDecoder

        if threads is not None and self.device == "cpu":
            torch.set_num_threads(threads)
        model = load_language_model(folder / LANGUAGE_MODEL, self.torch_device)
        if not model.config.tie_word_embeddings:
            # Embeddings come from the bundle's own table; half a gigabyte would lie idle.
            model.set_input_embeddings(torch.nn.Embedding(1, 1, dtype=model.dtype, device=model.device))
        return TransformersDecoder(model)

    def open_vision(
        self, folder: Path, manifest: Manifest, threads: int | None, release_memory: bool | None = None
    ) -> Vision:
        """As Backend.open_vision."""
        if self.vision_providers is not None:
            return VisionEncoder.open(folder, manifest, self.vision_providers, threads, release_memory)
        from vz_edge.backends.torch_vision import TorchVision

        return TorchVision.open(folder, manifest, self.torch_device, release_memory)


def require_packages(what: str) -> None:
    """Raise DependencyError where a package is missing or does not import; ``what`` needs them."""
    without = "or export with --format onnx, which runs without"
    require_installed(what, PACKAGES, f"{install_command('bnb')}, {without}")
    imported = [name for name in PACKAGES if name != "bitsandbytes"]  # which the trial of its kernel imports
    require_imports(what, imported, f"install a build of it for this machine, {without}")


def choose_device(providers: Provider | Sequence[Provider] | None, target: Literal["cpu", "cuda"]) -> Device:
    """Where the language model runs: on the CPU where ``providers`` begin with it, on CUDA where they do otherwise.

    None takes CUDA for a bundle exported for it, where torch has it. Raises ProviderError where torch does not, and
    for a provider that is not torch's.
    """
    import torch

    available = torch.cuda.is_available()
    if providers is None:
        return "cuda" if target == "cuda" and available else "cpu"
    first = next((provider_name(provider) for provider in listed_providers(providers)), "")
    device = DEVICES.get(first.removesuffix("ExecutionProvider").lower())
    if device is None:
        raise ProviderError(
            f"the language model cannot run on '{first}': torch runs it; take --provider cpu or --provider cuda"
        )
    if device == "cuda" and not available:
        raise ProviderError(
            f"the language model cannot run on '{first}': torch {torch.__version__} has no CUDA device here; install "
            "a CUDA build of torch, or take --provider cpu"
        )
    return device


def choose_device_id(providers: Provider | Sequence[Provider] | None, device: Device, device_id: int | None) -> int:
    """The number of the GPU: ``device_id``, or that of the first of ``providers``, or 0. Raises ProviderError."""
    own = 0 if providers is None else device_of(listed_providers(providers)[0])
    if device_id is None:
        return own if device == "cuda" else 0
    number = whole("device", device_id)
    if device == "cpu":
        raise ProviderError(
            f"device {number} is the number of a GPU, and the language model would run on the CPU; leave device out "
            "(--device-id), or take --provider cuda"
        )
    if own not in (0, number):
        raise ProviderError(f"device {number} and device_id {own} of a provider were both given; give one of them")
    return number


def _vision_providers(
    providers: Provider | Sequence[Provider] | None, target: Literal["cpu", "cuda"]
) -> tuple[Provider, ...]:
    """As choose_providers, whose errors then name the other way."""
    try:
        return tuple(choose_providers(providers, target))
    except (DependencyError, ProviderError) as error:
        raise type(error)(
            f"{error}; or let torch run the vision of this bundle too, with vision='torch' (--vision torch)"
        ) from error


def require_kernel(bits: int, device: str) -> None:
    """Run bitsandbytes' kernel once. Raises ProviderError where it fails or computes wrongly."""
    _silence_bitsandbytes()
    reason = fault(kernel_trial(bits, device))
    if reason is not None:
        raise ProviderError(
            f"bitsandbytes cannot run its {bits}-bit kernel on this machine's {device} ({reason}); build it from "
            "source for this machine, or export with --format onnx, which needs no bitsandbytes"
        )


def load_language_model(folder: Path, device: str, layers: int | None = None) -> Any:
    """The checkpoint in ``folder`` with transformers' ``from_pretrained``, or its first ``layers`` layers.

    On the CPU in bf16 whatever the checkpoint's own dtype is: products of several rows in fp16 are 50 times slower
    there (measured). Raises CorruptBundleError.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if device == "cpu":
            config.dtype = torch.bfloat16
            config.quantization_config["bnb_4bit_compute_dtype"] = "bfloat16"
        config.num_hidden_layers = layers or config.num_hidden_layers
        with _quiet_transformers():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=config.dtype,
                device_map={"": device},
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers, accelerate and safetensors have no common base class
        raise CorruptBundleError(
            f"{folder} cannot be loaded by transformers ({one_line(error)}); copy or export the bundle again"
        ) from error
    if found["missing_keys"]:
        raise CorruptBundleError(
            f"{folder} lacks {', '.join(sorted(found['missing_keys'])[:3])}...; export the bundle again"
        )
    return model.eval()


def _silence_bitsandbytes() -> None:
    """It warns of optional packages when imported and of LLM.int8()'s cast to fp16 at every layer of every token."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bar, and no report of the tensors of layers that are left out."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
