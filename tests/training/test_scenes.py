"""The scenes that vz-demo learns from: a seed is a picture, and every answer is true of what is drawn."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from training.scenes import COLOUR_NAMES, COLOURS, KINDS, SHAPE_NAMES, Item, Scene, make_scenes

# Share of its bounding box that a shape covers, however it is turned.
FILL = {"circle": (0.74, 0.82), "rectangle": (0.55, 1.0), "triangle": (0.42, 0.54), "star": (0.33, 0.39)}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return make_scenes(seed=1, count=40)


def drawn(scene: Scene) -> list[tuple[Item, np.ndarray]]:
    """Every item with the (row, column) of its pixels."""
    labels = np.asarray(scene.labels)
    return [(item, np.argwhere(labels == number)) for number, item in enumerate(scene.items, 1)]


def middle(pixels: np.ndarray) -> np.ndarray:
    """Row and column in the middle of a bounding box."""
    return (pixels.min(0) + pixels.max(0)) / 2


def answer(question: str, kind: str, things: list[tuple[Item, np.ndarray]]) -> str:
    """What is right by the pixels' labels, from the question's words alone."""
    words = [word.removesuffix("s") for word in re.findall(r"[a-z]+", question)]
    colours, shapes = ([word for word in words if word in names] for names in (COLOUR_NAMES, SHAPE_NAMES))
    digits = sorted((middle(pixels)[1], item.what) for item, pixels in things if item.colour is None)
    number = "".join(digit for _, digit in digits)
    if kind == "reading":
        return number or "none"
    if kind == "position":
        first, second = (
            middle(next(pixels for item, pixels in things if (item.colour, item.what) == named))
            for named in zip(colours, shapes, strict=True)
        )
        axis = 0 if {"above", "below"} & {*words} else 1
        comes_first = bool({"above", "left"} & {*words})
        return "yes" if (first[axis] < second[axis]) == comes_first else "no"
    found = [item for item, _ in things if item.colour and {*colours} <= {item.colour} and {*shapes} <= {item.what}]
    if kind == "count":
        return str(len(found))
    if kind == "presence":
        return "yes" if (number if "number" in words else found) else "no"
    (only,) = found
    return str(only.colour) if kind == "colour" else only.what


def test_a_seed_is_a_picture(scenes: list[Scene]) -> None:
    again, other = make_scenes(seed=1, count=3), make_scenes(seed=2, count=3)
    for scene, same, different in zip(scenes, again, other, strict=False):
        assert scene.image.tobytes() == same.image.tobytes() and scene.labels.tobytes() == same.labels.tobytes()
        assert (scene.items, scene.questions) == (same.items, same.questions)
        assert scene.image.tobytes() != different.image.tobytes()


def test_every_answer_is_true_of_what_is_drawn(scenes: list[Scene]) -> None:
    kinds: Counter[str] = Counter()
    for scene in scenes:
        things = drawn(scene)
        for question, given, kind in scene.questions:
            assert given == answer(question, kind, things), question
            kinds[kind] += 1
    assert set(kinds) == set(KINDS) and min(kinds.values()) >= 20


@pytest.mark.parametrize("shape", SHAPE_NAMES)
def test_a_shape_is_drawn_in_its_colour_and_form_where_its_box_is(scenes: list[Scene], shape: str) -> None:
    seen = 0
    for scene in scenes:
        picture = np.asarray(scene.image).astype(int)
        for item, pixels in drawn(scene):
            if item.what != shape:
                continue
            seen += 1
            left, top, right, bottom = item.box
            assert np.abs([*pixels.min(0), *pixels.max(0)] - np.array([top, left, bottom, right])).max() <= 1.5
            colour = np.median(picture[tuple(pixels.T)], axis=0)
            nearest = min(COLOURS, key=lambda name: np.abs(colour - COLOURS[name]).max())
            assert nearest == item.colour
            low, high = FILL[shape]
            assert low <= len(pixels) / np.prod(np.ptp(pixels, axis=0) + 1) <= high
    assert seen >= 10
