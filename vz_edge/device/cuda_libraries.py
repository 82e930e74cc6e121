"""The CUDA and cuDNN libraries that onnxruntime's CUDA provider needs, and where pip put them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

DRIVER = "libcuda.so.1"  # which no package holds


def wanted_libraries(cuda: str) -> list[str]:
    """File names for a build with that CUDA version ("12.8"): the driver's, the toolkit's and cuDNN's; none for "".

    Each comes after those that it needs. Source: ``_get_nvidia_dll_paths`` in ``onnxruntime/__init__.py`` (1.32), and
    its page on the CUDA provider's requirements for cuDNN 9 (since 1.19).
    """
    if not cuda:
        return []
    major = int(cuda.split(".")[0])
    toolkit = [f"lib{name}.so.{major}" for name in ("cudart", "nvrtc", "cublasLt", "cublas")]
    cufft = "libcufft.so.12" if major >= 13 else "libcufft.so.11"
    return [DRIVER, *toolkit, cufft, "libcurand.so.10", "libcudnn.so.9"]


def packaged_folders(names: Iterable[str], paths: Iterable[str] | None = None) -> list[str]:
    """Folders of NVIDIA's Python packages that hold some of ``names``; the loader does not look there by itself.

    ``paths``: where packages are looked for, by default Python's path.
    """
    wanted = set(names)
    folders = [
        folder for path in (sys.path if paths is None else paths) for folder in sorted(Path(path).glob("nvidia/*/lib"))
    ]
    return [str(folder) for folder in folders if wanted & {file.name for file in folder.iterdir()}]


def packaged_libraries(names: Iterable[str], paths: Iterable[str] | None = None) -> list[Path]:
    """Those of ``names``, in their order, that NVIDIA's Python packages hold; of several the first on the path."""
    wanted = list(names)
    folders = [Path(folder) for folder in packaged_folders(wanted, paths)]
    found = [next((folder / name for folder in folders if (folder / name).exists()), None) for name in wanted]
    return [library for library in found if library is not None]


def folders_of_all(names: Iterable[str], paths: Iterable[str] | None = None) -> list[str]:
    """Folders of NVIDIA's Python packages that together hold every one of ``names``; none where one is nowhere."""
    wanted = list(names)
    found = packaged_libraries(wanted, paths)
    return list(dict.fromkeys(str(library.parent) for library in found)) if len(found) == len(wanted) else []
