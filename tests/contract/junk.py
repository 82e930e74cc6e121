"""Values of every type that a caller may hand over by mistake, and what must come of them."""

from __future__ import annotations

import datetime
import decimal
import fractions
import io
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from vz_edge.errors import VzEdgeError


class WithoutRepr:
    """Its own methods raise."""

    def __repr__(self) -> str:
        raise ValueError("no repr")

    def __str__(self) -> str:
        raise ValueError("no str")

    def __index__(self) -> int:
        raise ZeroDivisionError

    def __fspath__(self) -> str:
        raise ZeroDivisionError

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError

    __hash__ = object.__hash__


class ReadsText:
    """An open file in text mode."""

    def read(self, size: int = -1) -> str:
        return "text"


class Breaks:
    """An open file that breaks off."""

    def read(self, size: int = -1) -> bytes:
        raise TimeoutError("the connection is gone")


FIXED: list[Callable[[], Any]] = [
    lambda: None,
    lambda: True,
    lambda: np.bool_(True),
    lambda: -1,
    lambda: 10**400,
    lambda: 10**5000,
    lambda: 1.5,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: 1e-320,
    lambda: 1e300,
    lambda: 1 + 2j,
    lambda: decimal.Decimal("0.5"),
    lambda: fractions.Fraction(1, 2),
    lambda: np.float32(0.5),
    lambda: np.int64(3),
    lambda: np.array(5),
    lambda: np.array([1, 2]),
    lambda: np.zeros((4, 4, 3), np.uint8),
    lambda: np.zeros((0, 4, 3), np.uint8),
    lambda: np.array([None, "x"], dtype=object),
    lambda: "5",
    lambda: "",
    lambda: "text\nof two lines",
    lambda: "a\0b",
    lambda: "\ud800",
    lambda: "\x1b[31mred",
    lambda: "x" * 5000,
    lambda: "<image>",
    lambda: b"",
    lambda: b"bytes",
    lambda: bytearray(b"\xff\xd8\xff"),
    lambda: memoryview(b"abcd")[::2],
    lambda: [],
    lambda: [[]],
    lambda: [None],
    lambda: ["a", 5],
    lambda: (1, 2),
    lambda: {},
    lambda: {"type": "object"},
    lambda: {"type": 5},
    lambda: {1: 2, (3,): 4},
    lambda: {"role": "user", "content": None},
    lambda: [{"role": "user", "content": None}],
    lambda: [{"role": "user", "content": [{"type": "image"}, {"type": ["text"]}]}],
    lambda: [{"role": 5, "content": "x"}],
    lambda: [{"role": "user", "content": "\ud800"}],
    lambda: {"set"},
    lambda: frozenset(),
    lambda: range(3),
    lambda: iter([1]),
    lambda: (number for number in "ab"),
    lambda: object(),
    lambda: object,
    lambda: print,
    lambda: io,
    lambda: Ellipsis,
    lambda: datetime.datetime(2024, 1, 1),
    lambda: pathlib.Path("absent"),
    lambda: pathlib.PurePosixPath("a\0b"),
    lambda: io.BytesIO(b"no picture"),
    lambda: io.StringIO("text"),
    lambda: ReadsText(),
    lambda: Breaks(),
    lambda: WithoutRepr(),
    lambda: [WithoutRepr()],
    lambda: Image.new("RGB", (0, 3)),
    lambda: Image.new("F", (3, 3)),
    lambda: ValueError("an exception"),
]


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"properties": {"a": value}}
    return value


FIXED.append(lambda: nested(3000))

# Built anew each time: iterators and files are used up.
JUNK: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(FIXED).map(lambda make: make()),
    st.integers(),
    st.floats(),
    st.text(st.characters(codec=None), max_size=8),
    st.binary(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
)


def assert_one_line(error: VzEdgeError) -> None:
    """What every error of the package is: a message that can be printed as it is."""
    message = str(error)
    assert message and message.isprintable() and len(message) < 2100, message


def settle(call: Callable[[], object]) -> object:
    """What ``call`` returns, or the package's own error; any other exception is the test's failure."""
    try:
        return call()
    except VzEdgeError as error:
        assert_one_line(error)
        return error
