from dataclasses import dataclass
from typing import Any, Literal

import pytest

from vz_edge import strict


@dataclass(frozen=True)
class Inner:
    count: int
    ratio: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    inner: Inner
    pairs: tuple[tuple[int, int], ...] = ()
    size: int | None = None
    table: dict[str, Inner] | None = None
    free: Any = None
    bits: Literal[1, 4] = 4


GOOD = {"name": "x", "kind": "a", "inner": {"count": 2}}


def test_loads_nested_data_and_defaults() -> None:
    data = {**GOOD, "pairs": [[1, 2], [3, 4]], "size": None, "table": {"k": {"count": 1, "ratio": 2}}, "free": [1]}
    assert strict.load(Outer, data) == Outer("x", "a", Inner(2), ((1, 2), (3, 4)), None, {"k": Inner(1, 2.0)}, [1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "x"}, "nam: unknown key (did you mean 'name'?)"),
        ({"inner": {"count": 2, "zzz": 1}}, "inner.zzz: unknown key; known keys: count, ratio"),
        ({"inner": {}}, "inner.count: missing"),
        ({"inner": 3}, "inner: expected a mapping"),
        ({"inner": {"count": "2"}}, "inner.count: expected int, got '2'"),
        ({"inner": {"count": True}}, "inner.count: expected int, got True"),
        ({"kind": "c"}, "kind: expected one of 'a', 'b'"),
        ({"bits": 4.0}, "bits: expected one of 1, 4, got 4.0"),
        ({"bits": True}, "bits: expected one of 1, 4, got True"),
        ({"pairs": [[1, 2, 3]]}, "pairs[0]: expected 2 items, got 3"),
        ({"pairs": "ab"}, "pairs: expected a list"),
        ({"size": "big"}, "size: expected int"),
        ({"table": {"k": {"count": None}}}, "table.k.count: expected int"),
    ],
)
def test_names_the_offending_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(strict.SchemaError) as error:
        strict.load(Outer, {**GOOD, **change})
    assert message in str(error.value)


def test_refuses_what_is_no_mapping() -> None:
    with pytest.raises(strict.SchemaError, match="expected a mapping"):
        strict.load(Outer, ["name"])
