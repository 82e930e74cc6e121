"""How large a schema may be, before native code reads it.

A compiler of schemas calls itself for each level of nesting, and for each ``$ref`` that it follows; a thread's stack is
what ends that, and the process with it. Both are counted as one depth here, and bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from vz_edge.errors import RequestError

MOST_SCHEMA_BYTES = 128 * 1024
MOST_SCHEMA_DEPTH = 128


def check_bytes(text: str) -> None:
    """Raise RequestError for the text of a schema, a pattern or a grammar that is larger than MOST_SCHEMA_BYTES."""
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MOST_SCHEMA_BYTES:
        raise RequestError(f"the schema has {size} bytes, more than {MOST_SCHEMA_BYTES}; simplify it")


def check_depth(schema: Mapping[str, Any]) -> None:
    """Raise RequestError for a JSON schema that is nested, or refers on and on, deeper than MOST_SCHEMA_DEPTH.

    Each level of objects and lists counts as one, and the target of a ``$ref`` as one below the place that refers. A
    target is followed once, as compilers do, so a schema may refer to itself.
    """
    seen: set[str] = set()
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if not isinstance(value, (Mapping, list, tuple)):
            continue
        if depth > MOST_SCHEMA_DEPTH:
            raise RequestError(
                f"the schema is deeper than {MOST_SCHEMA_DEPTH} levels, those behind a $ref counted; make it flatter"
            )
        inner = list(value.values()) if isinstance(value, Mapping) else list(value)
        reference = value.get("$ref") if isinstance(value, Mapping) else None
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            inner.append(_target(schema, reference))
        # What is behind a reference is followed first, as deep as it goes.
        waiting += [(item, depth + 1) for item in inner]


def _target(schema: Mapping[str, Any], reference: str) -> Any:
    """What a reference inside of the schema points to (RFC 6901); None for any other."""
    place: Any = schema
    for step in unquote(reference.removeprefix("#")).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(place, Mapping):
            place = place.get(key)
        elif isinstance(place, list) and key.isdecimal() and int(key[:9]) < len(place):
            place = place[int(key[:9])]
        else:
            return None
    return place if reference.startswith("#") else None
