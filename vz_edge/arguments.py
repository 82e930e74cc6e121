"""What a caller gave, checked where it comes in.

Each function returns the value as the type that it names, or raises a RequestError of one line that names the
argument. numpy's numbers are numbers; a bool is no number, and the text of a number is none either.

>>> whole("max_new_tokens", "5", least=1)
vz_edge.errors.RequestError: max_new_tokens '5' is impossible; expected a whole number from 1
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from vz_edge.errors import RequestError, VzEdgeError

MOST = 2**63 - 1  # what an int64 of numpy and ONNX Runtime holds
SHOWN_CHARACTERS = 60

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = SHOWN_CHARACTERS


def shown(value: object) -> str:
    """A value for a message: as Python writes it, in one line of at most about 60 characters."""
    try:
        text = " ".join(_REPR.repr(value).split())
    except Exception:  # of a value's own __repr__, or an int with more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN_CHARACTERS + 20 else f"{text[:SHOWN_CHARACTERS]}..."


def whole(name: str, value: object, least: int = 0, most: int = MOST, error: type[VzEdgeError] = RequestError) -> int:
    """A whole number from ``least`` to ``most``. Raises ``error``."""
    try:
        number = operator.index(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    except Exception:  # whatever a class of the caller's raises
        number = None
    if number is None or not least <= number <= most:
        up_to = "" if most == MOST else f" to {most}"
        raise error(f"{name} {shown(value)} is impossible; expected a whole number from {least}{up_to}")
    return number


def number(name: str, value: object, expected: str = "a number") -> float:
    """A real number that is not NaN; its range is the caller's to check. Raises RequestError."""
    try:
        real = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except Exception:  # OverflowError, and whatever a class of the caller's raises
        real = math.nan
    if math.isnan(real):
        raise RequestError(f"{name} {shown(value)} is impossible; expected {expected}")
    return real


def seconds(name: str, value: object) -> float | None:
    """Seconds above 0, or None. Raises RequestError."""
    if value is None:
        return None
    expected = "seconds, more than 0, or none"
    found = number(name, value, expected)
    if found <= 0:
        raise RequestError(f"{name} {shown(value)} is impossible; expected {expected}")
    return found


def flag(name: str, value: object) -> bool:
    """True or False. Raises RequestError."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} {shown(value)} is impossible; expected True or False")
    return value


def text(name: str, value: object) -> str:
    """A string that can be written as UTF-8: half of a surrogate pair is no character. Raises RequestError."""
    if not isinstance(value, str):
        raise RequestError(f"{name} {shown(value)} is impossible; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} {shown(value)} has half of a surrogate pair at {error.start}, which is no character; decode it "
            "anew"
        ) from error
    return value


def one_of(name: str, value: object, choices: Iterable[str]) -> str:
    """One of ``choices``. Raises RequestError."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise RequestError(f"{name} {shown(value)} is unknown; expected {' or '.join(map(repr, known))}")
    return value


def path(name: str, value: object, error: type[VzEdgeError] = RequestError) -> Path:
    """A path of a file or folder. Raises ``error``."""
    try:
        found = os.fspath(value)  # type: ignore[call-overload]
    except Exception:
        found = None
    if not isinstance(found, str) or "\0" in found:
        raise error(f"{name} {shown(value)} is impossible; expected a path, as a string or a pathlib.Path")
    return Path(found)


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file that a caller named. A pipe that nobody writes to is empty: ``open`` would wait for a writer."""
    waits_not = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | waits_not))  # noqa: SIM115 - the caller's
    if waits_not:
        os.set_blocking(file.fileno(), True)
    return file


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file that a caller named. Raises OSError and UnicodeDecodeError."""
    with open_file(path) as file:
        return file.read().decode("utf-8")


def known_options(what: str, given: Iterable[Any], known: Iterable[str]) -> None:
    """Raise RequestError for the first option ``given`` to ``what`` that is not ``known``, naming the nearest."""
    names = list(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise RequestError(f"{what} has no option {shown(name)}; {hint}There are: {', '.join(names)}")
