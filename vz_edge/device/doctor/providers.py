"""onnxruntime's build, and which of the providers it lists can really compute."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vz_edge.device.doctor.finding import Finding, Need, State
from vz_edge.device.process import Outcome
from vz_edge.device.requirements import JETSON_GUIDE, install_command
from vz_edge.device.runtime import CPU, CUDA

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# Measured on this matrix: 0.6 % on a CPU, whose products are int8 (accuracy level 4); 31 % without the zero points,
# 131 % with the halves of a byte swapped.
MAX_DISTANCE = 0.02
# Listed by the wheels but no part of this machine: it sends models to a remote service.
REMOTE = "AzureExecutionProvider"
MISSING_LIBRARY = re.compile(r"(lib[\w.+-]+): cannot open shared object file")


def build_finding(build: Outcome, demanded: Requirement | None) -> Finding:
    """Whether onnxruntime can be imported at all, and is as new as ``demanded``."""
    name = "onnxruntime build"
    if build.result is None:
        return Finding(
            name,
            "problem",
            f"importing onnxruntime fails: {build.failure}",
            "pip install --force-reinstall onnxruntime; if it stays so, its wheel is not built for this processor",
        )
    version = str(build.result["version"])
    cuda = f", CUDA {build.result['cuda']}" if build.result["cuda"] else ""
    detail = f"{version}{cuda}; lists {', '.join(build.result['providers'])}"
    if demanded is not None and not demanded.specifier.contains(version, prereleases=True):
        cpu, gpu = install_command("cpu"), install_command("gpu")
        fix = f"{cpu}, or for CUDA {gpu}; for CUDA on a Jetson see {JETSON_GUIDE}"
        return Finding(name, "problem", f"{detail}; expected {demanded.specifier}", fix)
    return Finding(name, "ok", detail)


def provider_findings(provider: str, trial: Outcome, gpu: bool) -> list[Finding]:
    """What ``trial`` (``vz_edge.device.doctor.trial``) says of one provider; ``gpu``: an NVIDIA GPU is here.

    The CPU must work, and CUDA where there is a GPU: a bundle for CUDA is run there and refused if it does not start.
    """
    needed = provider == CPU or (provider == CUDA and gpu)
    state: State = "problem" if needed else "warning"
    need: Need = "both" if provider == CPU else "run"
    short = provider.removesuffix("ExecutionProvider")
    kernel = f"4-bit MatMulNBits on {short}"
    result = trial.result
    if result is None:
        return [Finding(provider, state, trial.failure, _fix(provider, gpu), need)]
    if not result["started"]:
        missing = MISSING_LIBRARY.search(f"{trial.log} {result['error']}")
        reason = f"{missing[1]} is missing" if missing else result["error"] or "onnxruntime left it out without a word"
        return [Finding(provider, state, f"does not start: {reason}", _fix(provider, gpu), need)]
    started = Finding(provider, "ok", "a session starts", needed_for=need)
    if result["error"]:
        fix = f"choose another provider than {short.lower()}, or install another version of onnxruntime"
        return [started, Finding(kernel, state, f"does not run: {result['error']}", fix, need)]
    distance = float(result["distance"])
    if distance <= MAX_DISTANCE:
        return [started, Finding(kernel, "ok", f"within {distance:.1e} of numpy", needed_for=need)]
    wrong = Finding(
        kernel,
        "problem" if provider in (CPU, CUDA) else "warning",
        f"wrong numbers: {distance:.1e} from numpy, expected at most {MAX_DISTANCE}",
        "install another version of onnxruntime, and report this to its makers with the processor's name",
        need,
    )
    return [started, wrong]


def _fix(provider: str, gpu: bool) -> str:
    if provider == CPU:
        return "pip install --force-reinstall onnxruntime"
    if provider != CUDA:
        return "nothing, unless you mean to use it with --provider: vz-edge takes CUDA or the CPU"
    if gpu:
        return "install the libraries that 'CUDA libraries' lists, or run a bundle exported with --target cpu"
    return f"without an NVIDIA GPU: pip uninstall -y onnxruntime-gpu, then {install_command('cpu')}"
