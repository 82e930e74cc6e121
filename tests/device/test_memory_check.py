"""Whether a bundle fits, from its manifest and /proc alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vz_edge.bundle import read_manifest
from vz_edge.device.memory_check import MemoryNeed, available_memory_bytes, check_memory, memory_need
from vz_edge.device.runtime import CPU, CUDA
from vz_edge.errors import InsufficientMemoryError


def test_graphs_and_cache_are_needed_and_the_token_table_is_not(bundle: Path) -> None:
    manifest = dataclasses.replace(read_manifest(bundle), predicted={"kv_cache_bytes_per_token": 1000})
    need = memory_need(bundle, manifest, context_tokens=500)
    size = {name: (bundle / name).stat().st_size for name in ("vision.onnx", "decoder.onnx")}
    assert need == MemoryNeed(str(bundle), size["vision.onnx"], size["decoder.onnx"], 500_000)


def test_too_large_is_refused_with_the_figures() -> None:
    need = MemoryNeed("llava-13b", 1_200_000_000, 7_000_000_000, 300_000_000)
    check_memory([need], 8_500_000_000)
    check_memory([need], None)  # a machine that does not tell
    with pytest.raises(InsufficientMemoryError) as caught:
        check_memory([need], 8_499_999_999)
    assert str(caught.value) == (
        "at least 8.50 GB of memory is needed, 8.50 GB is available: llava-13b 8.50 GB (decoder 7.00 GB, "
        "vision 1.20 GB, KV cache 0.30 GB); take a smaller model or fewer bits ('vz-edge plan'), or end other programs"
    )


def test_available_memory_respects_the_control_group_and_a_jetsons_gpu_shares_it(tmp_path: Path) -> None:
    assert available_memory_bytes(CPU, tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemFree: 1 kB\nMemAvailable: 6000 kB\n")
    assert available_memory_bytes(CPU, tmp_path) == 6000 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("2048000\n")
    assert available_memory_bytes(CPU, tmp_path) == 2_048_000
    # Of the files that are cached in it, a group can give up all.
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("1500000\n")
    (tmp_path / "sys/fs/cgroup/memory.stat").write_text("anon 900000\nactive_file 200000\ninactive_file 300000\n")
    assert available_memory_bytes(CPU, tmp_path) == 1_048_000
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("9000000\n")
    assert available_memory_bytes(CPU, tmp_path) == 0
    (tmp_path / "sys/fs/cgroup/memory.current").unlink()
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3")
    assert available_memory_bytes(CUDA, tmp_path) == 2_048_000
