import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from vz_edge.device.mapped import MappedWeights

SIZE_BYTES = 64 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.data"
    np.arange(SIZE_BYTES // 4, dtype=np.int32).tofile(path)
    return path


def test_released_pages_cost_nothing_and_come_back_as_they_were(file: Path) -> None:
    weights = np.memmap(file, dtype=np.int32, mode="c")
    total = int(weights.sum(dtype=np.int64))
    mapped = MappedWeights(file)
    used = resident_bytes()
    mapped.release()
    assert used - resident_bytes() > SIZE_BYTES * 0.9
    assert int(weights.sum(dtype=np.int64)) == total


def test_a_mapping_that_was_written_to_is_left_alone(file: Path) -> None:
    weights = np.memmap(file, dtype=np.int32, mode="c")  # copy on write, as ONNX Runtime maps
    weights[12345] = -7
    MappedWeights(file).release()
    assert weights[12345] == -7


def test_a_file_that_is_not_mapped_releases_nothing(file: Path) -> None:
    MappedWeights(file).release()
    MappedWeights(file.with_name("absent")).release()
