"""Whether a bundle can fit into this machine's memory at all, known before anything is loaded.

>>> manifest = read_manifest(folder)
>>> check_memory([memory_need(folder, manifest, context_tokens=512)], available_memory_bytes("CPUExecutionProvider"))

What is counted is what no run can do without: the weights of both graphs and the KV cache. The token table is mapped
and a prompt reads a few of its rows; activations and the runtime come on top (``vz-edge plan`` estimates them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vz_edge.bundle import LANGUAGE_MODEL, Manifest
from vz_edge.device import nvml
from vz_edge.device.machine import l4t_release, meminfo_bytes, memory_left_bytes
from vz_edge.device.runtime import CPU, Provider, device_of, provider_name
from vz_edge.errors import InsufficientMemoryError

# A question of 1024 tokens, its picture's among them, is longer than most (LLaVA-NeXT's default budget is 320 tokens a
# picture). What is added stands for the decoder's activations and for what other programs may soon ask for.
QUESTION_TOKENS = 1024
SPARE_BYTES = 512 << 20


@dataclass(frozen=True)
class MemoryNeed:
    """The least that a loaded bundle takes while it answers."""

    bundle: str
    vision_bytes: int
    decoder_bytes: int
    cache_bytes: int

    @property
    def total_bytes(self) -> int:
        """All parts."""
        return self.vision_bytes + self.decoder_bytes + self.cache_bytes


def memory_need(folder: Path, manifest: Manifest, context_tokens: int) -> MemoryNeed:
    """What a bundle needs for a context of that many tokens, from its manifest alone."""

    def file_bytes(beginning: str) -> int:
        return sum(entry.size_bytes for name, entry in manifest.files.items() if name.startswith(beginning))

    per_token = manifest.predicted.get("kv_cache_bytes_per_token", 0)
    decoder_bytes = file_bytes(f"{LANGUAGE_MODEL}/" if manifest.format == "bnb" else "decoder.onnx")
    return MemoryNeed(str(folder), file_bytes("vision.onnx"), decoder_bytes, context_tokens * per_token)


def available_memory_bytes(provider: Provider, root: Path = Path("/")) -> int | None:
    """Memory that ``provider`` (ONNX Runtime's full name) can take now; None where the machine does not tell.

    The free memory (NVML) of the graphics card that it runs on; on the CPU, and on a Jetson, whose GPU shares it, what
    the system can give without swapping (MemAvailable, proc(5)), no more than the control group still grants.
    """
    if provider_name(provider) != CPU and l4t_release(root) is None:
        return nvml.free_bytes(device_of(provider))
    available = meminfo_bytes(root).get("MemAvailable")
    left = memory_left_bytes(root)
    return available if available is None or left is None else min(available, left)


def spare_memory_bytes(need: MemoryNeed) -> int:
    """Memory that must be available to a loaded bundle for vision to keep what a picture took.

    The KV cache of ``need``, a question's, must find room and leave some for others; and so must vision's weights:
    while they are mapped, the system counts them as available, and would read them from the disk for every picture.
    """
    return need.vision_bytes + need.cache_bytes + SPARE_BYTES


def is_short(least_bytes: int) -> bool:
    """Whether less than that is available to the CPU now; not where the machine does not tell."""
    available_bytes = available_memory_bytes(CPU)
    return available_bytes is not None and available_bytes < least_bytes


def release_rule(spare_bytes: int, release_memory: bool | None) -> Callable[[], bool]:
    """What says before each picture whether its memory is to be given back; ``release_memory`` as in EdgeModel.load."""
    if release_memory is None:
        return lambda: is_short(spare_bytes)
    return lambda: release_memory


def check_memory(needs: Sequence[MemoryNeed], available_bytes: int | None) -> None:
    """Raise InsufficientMemoryError where bundles, loaded together, need more than there is; None: not known."""
    needed_bytes = sum(need.total_bytes for need in needs)
    if available_bytes is None or needed_bytes <= available_bytes:
        return
    listing = "; ".join(
        f"{need.bundle} {_gigabytes(need.total_bytes)} (decoder {_gigabytes(need.decoder_bytes)}, vision "
        f"{_gigabytes(need.vision_bytes)}, KV cache {_gigabytes(need.cache_bytes)})"
        for need in needs
    )
    advice = "one bundle at a time, " if len(needs) > 1 else ""
    raise InsufficientMemoryError(
        f"at least {_gigabytes(needed_bytes)} of memory is needed, {_gigabytes(available_bytes)} is available: "
        f"{listing}; take {advice}a smaller model or fewer bits ('vz-edge plan'), or end other programs"
    )


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"
