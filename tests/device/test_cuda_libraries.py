"""Which CUDA libraries a build of onnxruntime needs, and finding them in NVIDIA's Python packages."""

from __future__ import annotations

from pathlib import Path

from vz_edge.device.cuda_libraries import folders_of_all, packaged_folders, packaged_libraries, wanted_libraries


def test_library_names_follow_the_cuda_version() -> None:
    assert {"libcublasLt.so.12", "libcufft.so.11", "libcudnn.so.9"} <= set(wanted_libraries("12.8"))
    assert {"libcublasLt.so.13", "libcufft.so.12", "libcudnn.so.9"} <= set(wanted_libraries("13.0"))
    assert wanted_libraries("") == []


def test_packages_are_found_wherever_they_lie_on_the_path(tmp_path: Path) -> None:
    files = (
        "a/nvidia/cublas/lib/libcublas.so.12",
        "b/nvidia/cu12/lib/libcublasLt.so.12",
        "b/nvidia/cu12/lib/libcublas.so.12",
    )
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "a/nvidia/nccl/lib").mkdir(parents=True)
    paths = [str(tmp_path / "nothing"), str(tmp_path / "a"), str(tmp_path / "b")]
    wanted = wanted_libraries("12.8")
    assert packaged_folders(wanted, paths) == [str((tmp_path / file).parent) for file in files[:2]]
    found = packaged_libraries(wanted, paths)
    both = ["libcublasLt.so.12", "libcublas.so.12"]
    assert folders_of_all(both, paths) == [str((tmp_path / file).parent) for file in (files[1], files[0])]
    assert folders_of_all([*both, "libcudnn.so.9"], paths) == [], "a path that leaves one out helps nobody"
    assert found == [tmp_path / files[1], tmp_path / files[0]], "in the order they need each other"
