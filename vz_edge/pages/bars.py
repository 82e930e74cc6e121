"""Bars of a drawing: what is stacked, in SVG units (drawn by bars.html.jinja)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A piece of a bar. ``style`` is a class of page.css, ``title`` what the pointer shows."""

    style: str
    x: float
    width: float
    title: str


def stack(x: float, scale: float, values: Iterable[tuple[str, float, str]]) -> tuple[tuple[Piece, ...], float]:
    """Pieces of (style, value, title) one after the other from ``x`` on, and where the last ends.

    ``scale`` is SVG units a unit of the values.
    """
    pieces, at = [], x
    for style, value, title in values:
        pieces.append(Piece(style, round(at, 1), round(value * scale, 1), title))
        at += value * scale
    return tuple(pieces), at
