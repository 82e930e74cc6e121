"""The CUDA and cuDNN libraries that onnxruntime's CUDA provider loads, found without loading them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vz_edge.device.cuda_libraries import wanted_libraries
from vz_edge.device.doctor.finding import Finding, State
from vz_edge.device.process import command_output
from vz_edge.device.requirements import JETSON_GUIDE, install_command

NAME = "CUDA libraries"
LIBRARY_FOLDERS = ("usr/local/cuda/lib64", "usr/lib/aarch64-linux-gnu/nvidia", "usr/lib/aarch64-linux-gnu/tegra")


def has_graphics_card(root: Path = Path("/")) -> bool:
    """Whether the driver of an NVIDIA card is loaded; a Jetson's GPU has other device files."""
    return (root / "dev/nvidiactl").exists()


def find_libraries(names: Iterable[str], root: Path = Path("/")) -> set[str]:
    """Those of ``names`` that the loader finds: its cache, LD_LIBRARY_PATH and the toolkit's own folder."""
    cache = command_output("ldconfig", "-p") or command_output("/sbin/ldconfig", "-p") or ""
    cached = {line.split()[0] for line in cache.splitlines() if " => " in line}
    folders = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    folders += [root / folder for folder in LIBRARY_FOLDERS]
    return {name for name in names if name in cached or any((folder / name).exists() for folder in folders)}


def cuda_finding(
    cuda: str | None, gpu: bool, jetson: bool, started: bool, found: set[str], packaged: list[str]
) -> Finding:
    """``cuda``: version that onnxruntime's CUDA provider was built with, "" if unknown, None without one.

    ``started``: a session started on it; ``found``: as find_libraries gives them; ``packaged``: folders of Python
    packages that hold all others.
    """
    if cuda is None and not gpu:
        return Finding(NAME, "ok", "no NVIDIA GPU, none needed", needed_for="run")
    if cuda is None:
        fix = (
            f"install an onnxruntime-gpu that is built for Jetson ({JETSON_GUIDE})"
            if jetson
            else f"pip uninstall -y onnxruntime, then {install_command('gpu')}"
        )
        detail = "an NVIDIA GPU is here, but this onnxruntime is built without CUDA and runs on the CPU"
        return Finding(NAME, "warning", detail, fix, "run")
    if started:
        return Finding(NAME, "ok", "onnxruntime loaded what it needs", needed_for="run")
    wanted = wanted_libraries(cuda)
    missing = [name for name in wanted if name not in found]
    state: State = "problem" if gpu else "warning"
    if not wanted:
        return Finding(NAME, state, "onnxruntime does not say which CUDA it was built with", _fix(jetson, cuda), "run")
    if not missing:
        detail, fix = "all found, yet the provider does not start", "compare the driver's CUDA version (nvidia-smi)"
        return Finding(NAME, state, f"{detail}; onnxruntime is built with CUDA {cuda}", fix, "run")
    detail = f"not found: {', '.join(missing)} (CUDA {cuda})"
    fix = f"export LD_LIBRARY_PATH={os.pathsep.join(packaged)}" if packaged else _fix(jetson, cuda)
    return Finding(NAME, state, detail, fix, "run")


def _fix(jetson: bool, cuda: str | None) -> str:
    if jetson:
        return f"sudo apt install nvidia-jetpack; the onnxruntime-gpu must be built for this JetPack ({JETSON_GUIDE})"
    toolkit = f"CUDA {cuda.split('.')[0]}" if cuda else "the CUDA toolkit"
    return f"pip install 'onnxruntime-gpu[cuda,cudnn]', or install {toolkit} and cuDNN 9 in the system"
