"""The endurance report: what grew is seen, and so is a frame that nobody counted."""

from __future__ import annotations

import pytest

from benchmarks.watch_endurance import Camera, Course, Second, growth_percent, report

COUNTED = {f"vz_edge_watch_frames_{name}_total": count for name, count in (("read", 90), ("taken", 5), ("dropped", 85))}


def test_growth_is_from_what_settled_to_the_highest_after() -> None:
    settling = [100, 140, 190, 200, 201, 199]
    assert growth_percent([*settling, 198, 204, 200], settle=6) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("given", "last_bytes", "age_sec", "missed"),
    [
        (90, 200, 0.03, []),
        (91, 200, 0.03, ["frames not accounted for"]),
        (90, 210, 0.03, ["growth of resident memory"]),
        (90, 200, 0.06, ["latency", "age when taken"]),
    ],
)
def test_each_bar_can_be_missed(given: int, last_bytes: int, age_sec: float, missed: list[str]) -> None:
    camera = Camera()
    camera.given, camera.longest_interval_sec = given, 0.035
    first = Second(resident_bytes=200, latency_sec=0.2, age_sec=0.0, inference_sec=0.2)
    last = Second(resident_bytes=last_bytes, latency_sec=0.2 + age_sec, age_sec=age_sec, inference_sec=0.2)
    written = report(Course([first, last], results=5), COUNTED, camera, minutes=0.1, busy=0.0)
    assert [bar.what for bar in written.bars if not bar.met] == missed
