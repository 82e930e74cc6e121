"""ONNX Runtime sessions: which execution provider, how many threads, and errors that say what to do.

A bundle exported for CUDA holds fp16 graphs, one for the CPU fp32; the provider follows from that unless it
is named.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from vz_edge.device.cuda_libraries import packaged_libraries, wanted_libraries
from vz_edge.device.dependencies import require_imports
from vz_edge.device.requirements import JETSON_GUIDE, install_command
from vz_edge.errors import CorruptBundleError, DependencyError, ProviderError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
LOG_ERRORS_ONLY = 3
# The arena of ONNX Runtime's CUDA provider doubles with each region that it takes, and never shrinks: weights of 7 GB
# would leave the next 100 MB of activations a region of 8 GB. So weights stay out of it (microsoft/onnxruntime pull
# 7267), and it grows by what is asked for. A vision graph has one convolution, which needs no search by trial.
CUDA_OPTIONS = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
WEIGHTS_OUT_OF_ARENA = "session.use_device_allocator_for_initializers"


def open_session(
    path: Path,
    providers: Sequence[str],
    threads: int | None,
    leave_mapped: bool = False,
    cuda_graph: bool = False,
) -> InferenceSession:
    """Open an ONNX file on the first of ``providers`` that takes a node, the CPU last.

    ``threads`` are intra-op threads, None for one on each physical core. ``leave_mapped`` keeps float weights as they
    lie in their file instead of a repacked copy; matrix products with many rows are as fast (measured). ``cuda_graph``
    lets CUDA capture runs, as their option ``gpu_graph_id`` says.

    Raises ProviderError where the first provider does not start, lacks an operator or cannot capture, and
    CorruptBundleError where the file is not a model.
    """
    ort = import_onnxruntime()
    if providers[0] == CUDA:
        preload_cuda(ort)
    options = session_options(providers, threads, leave_mapped)
    try:
        session = ort.InferenceSession(
            path,
            options,
            providers=list(providers),
            provider_options=provider_options(providers, cuda_graph),
        )
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise _session_error(path, providers, error) from error
    started = session.get_providers()
    if providers[0] not in started:
        raise ProviderError(
            f"{providers[0]} is installed but did not start (its driver or CUDA libraries are missing); "
            f"started: {', '.join(started)}; install them, or choose another provider"
        )
    return session


def session_options(providers: Sequence[str], threads: int | None, leave_mapped: bool = False) -> SessionOptions:
    """ONNX Runtime's options of a session, as ``open_session`` takes them."""
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = LOG_ERRORS_ONLY
    # The decoder's inputs have another shape at every token: patterns would be computed and kept for each.
    options.enable_mem_pattern = False
    if leave_mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if providers[0] == CUDA:
        options.add_session_config_entry(WEIGHTS_OUT_OF_ARENA, "1")
    return options


def provider_options(providers: Sequence[str], cuda_graph: bool = False) -> list[dict[str, str]]:
    """The options of each provider, as ``open_session`` takes them."""
    cuda = CUDA_OPTIONS | ({"enable_cuda_graph": "1"} if cuda_graph else {})
    return [dict(cuda) if name == CUDA else {} for name in providers]


def choose_providers(requested: Sequence[str] | None, target: Literal["cpu", "cuda"]) -> list[str]:
    """Full provider names in order of preference.

    ``requested`` may use short names ("cuda"); None takes CUDA for a bundle exported for it, where this machine
    has it, and the CPU otherwise. Raises ProviderError where a requested one is not there, DependencyError.
    """
    available: list[str] = import_onnxruntime().get_available_providers()
    if requested is None:
        return [CUDA, CPU] if target == "cuda" and CUDA in available else [CPU]
    by_short_name = {name.removesuffix("ExecutionProvider").lower(): name for name in available}
    chosen = []
    for name in [requested] if isinstance(requested, str) else requested:
        short = name.removesuffix("ExecutionProvider").lower()
        if short not in by_short_name:
            raise ProviderError(
                f"no execution provider '{name}' in this onnxruntime; there are: {', '.join(by_short_name)}"
            )
        chosen.append(by_short_name[short])
    if not chosen:
        raise ProviderError(f"no execution provider named; there are: {', '.join(by_short_name)}")
    return chosen


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


def _session_error(path: Path, providers: Sequence[str], error: Exception) -> CorruptBundleError | ProviderError:
    reason = " ".join(str(error).split())
    kind = type(error).__name__
    if "graph capture" in reason:
        return ProviderError(
            f"{providers[0]} cannot capture {path.name} as a CUDA graph ({reason}); load it without cuda_graph"
        )
    if kind in ("NotImplemented", "EPFail") or "Could not find an implementation" in reason:
        return ProviderError(
            f"{providers[0]} cannot run {path.name} ({reason}); export the bundle for it "
            "('vz-edge export --target'), or choose another provider"
        )
    return CorruptBundleError(f"{path} cannot be loaded by onnxruntime ({kind}: {reason}); export the bundle again")
