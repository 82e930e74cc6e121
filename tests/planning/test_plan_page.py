"""The page of a plan: whole for every device and runtime, drawn within its panels, nothing fetched."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from vz_edge.planning.devices import device_names, load_device
from vz_edge.planning.plan import Asked, Row, candidates, plan_row
from vz_edge.planning.plan_page import DECODE_X, MEMORY_WIDTH, MEMORY_X, TIME_WIDTH, TIME_X, WIDTH, page
from vz_edge.recipe import load_recipe

# The largest, the paper's, one tile alone, and one so small that bars and limit are far apart.
RECIPES = ("llava-next-34b", "llava-next-13b", "llava-1.5-7b", "vz-demo")


def rows(devices: list[str], asked: Asked) -> list[Row]:
    found = candidates([load_recipe(name) for name in RECIPES], [4, 16], [])
    return [plan_row(candidate, load_device(name), asked) for name in devices for candidate in found]


def parsed(text: str) -> ET.Element:
    """The page as XML: everything is closed but what HTML never closes."""
    return ET.fromstring(re.sub(r"<(meta[^>]*|br)>", r"<\1/>", text.removeprefix("<!doctype html>\n")))


@pytest.mark.parametrize(
    ("runtime", "devices"),
    [("onnxruntime", device_names()), ("transformers", [name for name in device_names() if name != "cpu"])],
)
def test_every_device_is_drawn_within_its_panels(runtime: str, devices: list[str]) -> None:
    asked = Asked(runtime, frames_per_minute=10)
    tree = parsed(page(rows(devices, asked), asked))
    drawings = [element for element in tree.iter("svg") if element.get("class") == "drawing"]
    assert len(drawings) == len(devices)
    for drawing in drawings:
        assert drawing.get("viewBox", "").split()[2] == str(WIDTH)
        for rect in drawing.iter("rect"):
            start, end = float(rect.attrib["x"]), float(rect.attrib["x"]) + float(rect.attrib["width"])
            assert (
                MEMORY_X <= start <= end <= MEMORY_X + MEMORY_WIDTH + 0.2
                or TIME_X <= start <= end <= TIME_X + TIME_WIDTH + 0.2
                or DECODE_X <= start <= end <= WIDTH
            )
        for line in drawing.iter("line"):
            assert MEMORY_X < float(line.attrib["x1"]) <= MEMORY_X + MEMORY_WIDTH


def test_it_holds_every_verdict_and_source_and_fetches_nothing() -> None:
    asked = Asked()
    shown = rows(["orin-nano-8", "cpu"], asked)
    text = page(shown, asked)
    words = " ".join("".join(parsed(text).itertext()).split())
    for row in shown:
        assert row.candidate.label in words and row.fit in words
        assert row.device.app_memory_bytes.source in words
        assert row.device.bandwidth_bytes_per_sec.source in words
    assert "the vanilla 7B does not fit here" in words and "no published figure" in words
    assert "mean of nine benchmarks" in words and "mit-han-lab/llm-awq" in words
    assert not re.search(r"<script|<link|<img|src=|url\(|@import", text)


def test_a_limit_far_beyond_the_bars_is_written_and_not_drawn() -> None:
    asked = Asked()
    near = page(rows(["orin-nano-8"], asked), asked)
    assert "<line" in near and "beyond this scale" not in near
    demo = plan_row(candidates([load_recipe("vz-demo")], [4], [])[0], load_device("h200"), asked)
    far = page([demo], asked)
    assert "<line" not in far and "beyond this scale" in far
