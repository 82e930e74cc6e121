"""ONNX Runtime sessions: which execution provider, how many threads, and errors that say what to do.

A bundle exported for CUDA holds fp16 graphs, one for the CPU fp32; the provider follows from that unless it
is named.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from vz_edge.arguments import shown, whole
from vz_edge.device.cuda_libraries import packaged_libraries, wanted_libraries
from vz_edge.device.dependencies import require_imports
from vz_edge.device.requirements import JETSON_GUIDE, install_command
from vz_edge.errors import CorruptBundleError, DependencyError, ProviderError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
LOG_ERRORS_ONLY = 3
# A provider as ONNX Runtime takes it: its name, or its name and its options ("cuda", {"device_id": 1}).
Provider = str | tuple[str, Mapping[str, Any]]
DEVICE_ID = "device_id"
# Those that have this option (https://onnxruntime.ai/docs/execution-providers/).
OF_DEVICES = tuple(f"{name}ExecutionProvider" for name in ("CUDA", "Tensorrt", "ROCM", "MIGraphX", "Dml", "CANN"))
# The arena of ONNX Runtime's CUDA provider doubles with each region that it takes, and never shrinks: weights of 7 GB
# would leave the next 100 MB of activations a region of 8 GB. So weights stay out of it (microsoft/onnxruntime pull
# 7267), and it grows by what is asked for. A vision graph has one convolution, which needs no search by trial.
CUDA_OPTIONS = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
WEIGHTS_OUT_OF_ARENA = "session.use_device_allocator_for_initializers"


def open_session(
    path: Path,
    providers: Sequence[Provider],
    threads: int | None,
    leave_mapped: bool = False,
    cuda_graph: bool = False,
) -> InferenceSession:
    """Open an ONNX file on the first of ``providers`` that takes a node, the CPU last.

    ``threads`` are intra-op threads, None for one on each physical core. ``leave_mapped`` keeps float weights as they
    lie in their file instead of a repacked copy, which makes CLIP-L a twentieth to a tenth faster (measured:
    five tiles, one). ``cuda_graph`` lets CUDA capture runs, as their option ``gpu_graph_id`` says.

    Raises ProviderError where the first provider does not start, lacks an operator or cannot capture, and
    CorruptBundleError where the file is not a model.
    """
    ort = import_onnxruntime()
    first = provider_name(providers[0])
    if first == CUDA:
        preload_cuda(ort)
    options = session_options(providers, threads, leave_mapped)
    try:
        session = ort.InferenceSession(
            path,
            options,
            providers=list(map(provider_name, providers)),
            provider_options=provider_options(providers, cuda_graph),
        )
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise _session_error(path, providers[0], error) from error
    started = session.get_providers()
    if first not in started:
        raise ProviderError(
            f"{first} is installed but did not start (its driver or CUDA libraries are missing); "
            f"started: {', '.join(started)}; install them, or choose another provider"
        )
    device = device_of(providers[0])
    if device != int(session.get_provider_options()[first].get(DEVICE_ID, device)):
        raise ProviderError(  # onnxruntime tries once more, without the options
            f"{first} did not start on device {device}; check that there is such a GPU (nvidia-smi -L)"
        )
    return session


def session_options(providers: Sequence[Provider], threads: int | None, leave_mapped: bool = False) -> SessionOptions:
    """ONNX Runtime's options of a session, as ``open_session`` takes them."""
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = LOG_ERRORS_ONLY
    # The decoder's inputs have another shape at every token: patterns would be computed and kept for each.
    options.enable_mem_pattern = False
    if leave_mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if provider_name(providers[0]) == CUDA:
        options.add_session_config_entry(WEIGHTS_OUT_OF_ARENA, "1")
    return options


def provider_options(providers: Sequence[Provider], cuda_graph: bool = False) -> list[dict[str, str]]:
    """The options of each provider, as ``open_session`` takes them; those that a provider has of its own come first."""
    cuda = CUDA_OPTIONS | ({"enable_cuda_graph": "1"} if cuda_graph else {})
    return [(cuda if name == CUDA else {}) | options for name, options in map(split_provider, providers)]


def choose_providers(
    requested: Provider | Sequence[Provider] | None, target: Literal["cpu", "cuda"], device: int | None = None
) -> list[Provider]:
    """Full provider names, those that have options with them, in order of preference.

    ``requested`` may use short names ("cuda"); None takes CUDA for a bundle exported for it, where this machine
    has it, and the CPU otherwise. ``device`` is the number of the GPU to run on. Raises ProviderError where a requested
    one is not there or has no such number, and DependencyError.
    """
    available: list[str] = import_onnxruntime().get_available_providers()
    chosen: list[Provider] = [CUDA, CPU] if target == "cuda" and CUDA in available else [CPU]
    if requested is not None:
        chosen = [_available(*split_provider(provider), available) for provider in listed_providers(requested)]
    if not chosen:
        raise ProviderError(f"no execution provider named; there are: {', '.join(_by_short_name(available))}")
    return chosen if device is None else _all_on_device(chosen, whole("device", device))


def listed_providers(requested: Any) -> list[Any]:
    """One provider or several as a list. Raises ProviderError for what is neither."""
    if isinstance(requested, str) or (isinstance(requested, tuple) and _is_pair(requested)):
        return [requested]
    if not isinstance(requested, (list, tuple)):
        raise ProviderError(
            f"providers {shown(requested)} are not understood; expected a list of names, such as ['cuda', 'cpu']"
        )
    return list(requested)


def split_provider(provider: object) -> tuple[str, dict[str, str]]:
    """Name and options of a provider, the options as the text that ONNX Runtime reads. Raises ProviderError."""
    if isinstance(provider, str):
        return provider, {}
    if not isinstance(provider, (list, tuple)) or not _is_pair(provider):
        raise ProviderError(
            f"provider {shown(provider)} is not understood; expected a name, or a name and its options, such as "
            "('cuda', {'device_id': 1})"
        )
    name, options = provider
    for option, value in options.items():
        if not isinstance(option, str) or not isinstance(value, (str, int, float)):
            raise ProviderError(f"option {shown(option)} of {name} is {shown(value)}; expected text or a number")
    if DEVICE_ID in options:
        number = options[DEVICE_ID]
        whole(DEVICE_ID, int(number) if isinstance(number, str) and number.isdecimal() else number, error=ProviderError)
    return name, {option: str(value) for option, value in options.items()}


def provider_name(provider: object) -> str:
    """The name alone."""
    return split_provider(provider)[0]


def device_of(provider: object) -> int:
    """The number of the GPU that a provider runs on, as CUDA counts; ONNX Runtime's own default is 0."""
    return int(split_provider(provider)[1].get(DEVICE_ID, 0))


def on_device(name: str, device: int | None) -> Provider:
    """The provider of that full name on the GPU of that number, where it is known."""
    return name if device is None or name not in OF_DEVICES else (name, {DEVICE_ID: str(device)})


def _is_pair(provider: Any) -> bool:
    return len(provider) == 2 and isinstance(provider[0], str) and isinstance(provider[1], Mapping)


def _available(name: str, options: dict[str, str], available: Sequence[str]) -> Provider:
    by_short_name = _by_short_name(available)
    short = name.removesuffix("ExecutionProvider").lower()
    if short not in by_short_name:
        raise ProviderError(
            f"no execution provider '{name}' in this onnxruntime; there are: {', '.join(by_short_name)}"
        )
    return (by_short_name[short], options) if options else by_short_name[short]


def _by_short_name(available: Sequence[str]) -> dict[str, str]:
    return {full.removesuffix("ExecutionProvider").lower(): full for full in available}


def _all_on_device(chosen: Sequence[Provider], device: int) -> list[Provider]:
    """``chosen``, with the number of the GPU for each that takes one."""
    first = provider_name(chosen[0])
    if first not in OF_DEVICES:
        raise ProviderError(
            f"device {device} is the number of a GPU, and {first} runs on none; leave device out (--device-id), or "
            "choose a provider that does, such as 'cuda'"
        )
    numbered = list[Provider]()
    for provider in chosen:
        name, options = split_provider(provider)
        if int(options.get(DEVICE_ID, device)) != device:
            raise ProviderError(
                f"device {device} and {DEVICE_ID} {options[DEVICE_ID]} of {name} were both given; give one of them"
            )
        numbered.append((name, {**options, DEVICE_ID: str(device)}) if name in OF_DEVICES else provider)
    return numbered


def import_onnxruntime() -> ModuleType:
    """The onnxruntime module. Raises DependencyError where no package of it is installed, or it does not import."""
    if find_spec("onnxruntime") is None:
        raise DependencyError(
            f"onnxruntime is not installed; {install_command('cpu')}, or for CUDA {install_command('gpu')}; "
            f"for CUDA on a Jetson see {JETSON_GUIDE}"
        )
    remedy = "install a build of it for this machine ('vz-edge doctor' looks further)"
    require_imports("a bundle", ["onnxruntime"], remedy)
    import onnxruntime

    return onnxruntime


def preload_cuda(ort: ModuleType) -> None:
    """Load CUDA and cuDNN where pip put them (packages ``nvidia-*``): the system's loader does not look there.

    onnxruntime looks beside itself alone, so those of another folder of Python's path are loaded first: it may have
    been installed apart from them (``pip install --target``). Libraries that are nowhere are named on stderr; whether
    the provider starts without them, it says itself.
    """
    for library in packaged_libraries(wanted_libraries(getattr(ort, "cuda_version", ""))):
        with contextlib.suppress(OSError):  # of another CUDA's driver, or its own needs are missing: the provider tells
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    if hasattr(ort, "preload_dlls"):  # since 1.21
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()


def physical_cores() -> int:
    """Physical cores this process may run on; hardware threads of one core count once.

    Two threads on one core share its vector units, and matrix products gain nothing from the second.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, len(cores))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def _session_error(path: Path, provider: Provider, error: Exception) -> CorruptBundleError | ProviderError:
    reason = " ".join(str(error).split())
    kind = type(error).__name__
    name, options = split_provider(provider)
    if "graph capture" in reason:
        return ProviderError(
            f"{name} cannot capture {path.name} as a CUDA graph ({reason}); load it without cuda_graph"
        )
    if options and "option" in reason:
        given = ", ".join(f"{option}={value}" for option, value in options.items())
        return ProviderError(f"{name} does not start with {given} ({reason}); correct its options, or leave them out")
    if kind in ("NotImplemented", "EPFail") or "Could not find an implementation" in reason:
        return ProviderError(
            f"{name} cannot run {path.name} ({reason}); export the bundle for it "
            "('vz-edge export --target'), or choose another provider"
        )
    return CorruptBundleError(f"{path} cannot be loaded by onnxruntime ({kind}: {reason}); export the bundle again")
