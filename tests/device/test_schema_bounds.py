"""What a schema may have before native code reads it."""

from __future__ import annotations

from typing import Any

import pytest

from vz_edge.device.schema_bounds import MOST_SCHEMA_BYTES, MOST_SCHEMA_DEPTH, check_bytes, check_depth
from vz_edge.errors import RequestError


def chain(links: int) -> dict[str, Any]:
    """Objects, each of which has the next one as its property."""
    definitions: dict[str, Any] = {
        f"A{number}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/A{number + 1}"}}}
        for number in range(links)
    }
    return {"$defs": {**definitions, f"A{links}": {"type": "null"}}, "$ref": "#/$defs/A0"}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


def test_nesting_is_bounded() -> None:
    check_depth(nested(MOST_SCHEMA_DEPTH))
    with pytest.raises(RequestError, match="deeper than 128 levels"):
        check_depth(nested(MOST_SCHEMA_DEPTH + 1))


@pytest.mark.parametrize("links", [100, 1000])
def test_what_is_behind_references_counts(links: int) -> None:
    check_depth(chain(20))
    with pytest.raises(RequestError, match="deeper"):
        check_depth(chain(links))


def test_names_in_references_are_unescaped() -> None:
    hidden = {"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": nested(MOST_SCHEMA_DEPTH)}}
    with pytest.raises(RequestError, match="deeper"):
        check_depth(hidden)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/T", "$defs": {"T": {"type": "array", "items": {"$ref": "#/$defs/T"}}}},
        {"$ref": "#/nowhere/0"},
        {"$ref": "https://example.org/schema"},
        {"$ref": 3},
        {"anyOf": [{"$ref": "#/anyOf/1"}, {"$ref": "#/anyOf/0"}]},
        {"anyOf": [{"$ref": "#/anyOf/٣"}, {"$ref": "#/anyOf/99999999999999999999"}]},
    ],
)
def test_a_schema_may_refer_to_itself_or_to_nothing(schema: dict[str, Any]) -> None:
    check_depth(schema)


def test_bytes_are_bounded() -> None:
    check_bytes("a" * MOST_SCHEMA_BYTES)
    with pytest.raises(RequestError, match="bytes, more than"):
        check_bytes("é" * (MOST_SCHEMA_BYTES // 2 + 1))
