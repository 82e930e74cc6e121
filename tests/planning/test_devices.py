"""Device profiles: every one that ships goes through the parser; what a user gets wrong is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vz_edge.errors import DeviceError
from vz_edge.planning.devices import BANDWIDTH_RANGE, DeviceProfile, device_names, load_device, parse_device
from vz_edge.recipe import data_folder

ROWS = {  # the published table: GB, GB/s, fp16 TFLOP/s with fp32 and with fp16 accumulation, int8 TOPS, capability
    "orin-nano-8": (8, 68, 10, 10, 20, 8.7),
    "orin-nano-8-super": (8, 102, 17, 17, 33, 8.7),
    "orin-nx-8": (8, 102.4, 12.5, 12.5, 25, 8.7),
    "orin-nx-16": (16, 102.4, 15, 15, 30, 8.7),
    "agx-orin-32": (32, 204.8, 27, 27, 54, 8.7),
    "agx-orin-64": (64, 204.8, 42.5, 42.5, 85, 8.7),
    "agx-thor": (128, 273, 259, 259, None, 11.0),
    "rtx-3060-12": (12, 360, 25.5, 51, 102, 8.6),
    "rtx-3080-10": (10, 760, 59.5, 119, 238, 8.6),
    "rtx-4060-ti-16": (16, 288, 44, 88, 177, 8.9),
    "rtx-4070-12": (12, 504.2, 58, 117, 233, 8.9),
    "rtx-4090-24": (24, 1008, 165.2, 330.3, 660.6, 8.9),
    "rtx-5090-32": (32, 1792, 209.5, 419, 838, 12.0),
    "a800-80": (80, 1940, 312, 312, 624, 8.0),
    "h100-80": (80, 3350, 989, 989, 1979, 9.0),
    "h200": (141, 4800, 989, 989, 1979, 9.0),
}


def figures(data: object) -> list[dict]:
    """Every mapping with a value in a profile."""
    if not isinstance(data, dict):
        return []
    if "value" in data:
        return [data]
    return [found for value in data.values() for found in figures(value)]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_profile_has_the_published_figures(name: str) -> None:
    memory, bandwidth, fp32acc, fp16acc, int8, capability = ROWS[name]
    device = load_device(name)
    peaks = device.peaks_flops_per_sec
    assert device.memory_bytes.value == pytest.approx(memory * 2**30, rel=0.005)
    assert device.bandwidth_bytes_per_sec.value == bandwidth * 1e9
    assert peaks.fp16_fp32acc and peaks.fp16_fp32acc.value == fp32acc * 1e12
    assert peaks.fp16_fp16acc and peaks.fp16_fp16acc.value == fp16acc * 1e12
    assert (peaks.int8.value / 1e12 if peaks.int8 else None) == int8
    assert device.compute_capability and device.compute_capability.value == capability
    assert device.unified_memory == (device.device_class == "jetson")


def test_there_is_one_profile_a_row_and_one_for_the_processor() -> None:
    assert device_names() == sorted([*ROWS, "cpu"])


@pytest.mark.parametrize("name", device_names())
def test_every_number_of_a_profile_says_where_it_is_from(name: str) -> None:
    data = yaml.safe_load((data_folder("profiles") / f"{name}.yaml").read_text(encoding="utf-8"))
    assert len(figures(data)) >= 5
    assert all(len(figure["source"]) > 10 for figure in figures(data))
    bare = [key for key, value in data.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    assert not bare


def with_changes(tmp_path: Path, changes: dict) -> Path:
    """AGX Orin 64 as a user's file, with keys like "peaks_flops_per_sec.int8" replaced; None removes one."""
    data = yaml.safe_load((data_folder("profiles") / "agx-orin-64.yaml").read_text(encoding="utf-8"))
    data["name"] = "mine"
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = data
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def test_a_user_adds_a_board_by_its_file(tmp_path: Path) -> None:
    device = load_device(with_changes(tmp_path, {"title": "My board"}))
    assert isinstance(device, DeviceProfile) and device.title == "My board"
    assert device.peak("int8") == 85e12


WRONG = {
    "bandwidth_bytes_per_sec is 5e+12, impossible for a jetson; expected 2e+10 to 1e+12": {
        "bandwidth_bytes_per_sec.value": 5e12
    },
    "app_memory_bytes is 8e+10, impossible for a jetson with that memory_bytes": {
        "app_memory_bytes.value": 80_000_000_000
    },
    "memory_bytes is 64, impossible": {"memory_bytes.value": 64},
    "peaks_flops_per_sec.int8 is 275, impossible": {"peaks_flops_per_sec.int8.value": 275},
    "peaks_flops_per_sec.fp16_fp32acc: missing": {"peaks_flops_per_sec.fp16_fp32acc": None},
    "bandwidth_bytes_per_sec: missing": {"bandwidth_bytes_per_sec": None},
    "bandwidth_bytes_per_sec.source: missing": {"bandwidth_bytes_per_sec.source": None},
    "bandwidth_bytes_per_sec.source is empty": {"bandwidth_bytes_per_sec.source": " "},
    "compute_capability: missing": {"compute_capability": None},
    "bandwidth_per_sec: unknown key (did you mean 'bandwidth_bytes_per_sec'?)": {"bandwidth_per_sec": 1},
    "device_class: expected one of": {"device_class": "phone"},
    "memory_bytes.value: expected int": {"memory_bytes.value": "64 GB"},
    "name is 'other', expected 'mine'": {"name": "other"},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_profile_is_refused_with_file_key_and_range(tmp_path: Path, message: str) -> None:
    path = with_changes(tmp_path, WRONG[message])
    with pytest.raises(DeviceError, match=re.escape(message)) as raised:
        load_device(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_no_yaml_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: [\n", encoding="utf-8")
    with pytest.raises(DeviceError, match=r"broken\.yaml") as raised:
        parse_device(path)
    assert "\n" not in str(raised.value)


def test_an_unknown_device_is_told_the_nearest_names() -> None:
    with pytest.raises(DeviceError, match="no device 'agx-orin'; nearest: agx-orin-"):
        load_device("agx-orin")
    with pytest.raises(DeviceError, match="there are: a800-80"):
        load_device("!!!")
    with pytest.raises(DeviceError, match="does not exist"):
        load_device("boards/none.yaml")


@settings(max_examples=30, deadline=None)  # each writes and parses a file
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_bandwidth_is_taken_if_and_only_if_it_is_in_range(
    tmp_path_factory: pytest.TempPathFactory, value: float
) -> None:
    low, high = BANDWIDTH_RANGE["jetson"]
    path = with_changes(tmp_path_factory.getbasetemp(), {"bandwidth_bytes_per_sec.value": value})
    if low <= value <= high:
        assert load_device(path).bandwidth_bytes_per_sec.value == value
    else:
        with pytest.raises(DeviceError, match="bandwidth_bytes_per_sec"):
            load_device(path)
