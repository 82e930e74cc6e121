"""Strict loading of plain data (YAML, JSON) into frozen dataclasses.

Every field is checked against its annotation and an unknown key is refused, so that a typing mistake in a
recipe or a manifest is an error at the line where it was made, never a default taken in silence.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


class SchemaError(ValueError):
    """The data does not fit the dataclass; the message starts with the path of the offending key."""


def load(cls: type[T], data: Any, path: str = "") -> T:
    """Build ``cls`` (a dataclass) from a mapping, checking every value.

    Nested dataclasses, ``X | None``, ``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[str, X]``, ``Literal`` and
    the scalars are understood. Raises SchemaError.
    """
    if not isinstance(data, dict):
        raise SchemaError(f"{path or cls.__name__}: expected a mapping, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else f"; known keys: {', '.join(fields)}"
            raise SchemaError(f"{_join(path, key)}: unknown key{hint}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SchemaError(f"{_join(path, name)}: missing")
    return cls(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(args, value, path)
    if origin is typing.Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):  # 4.0 and True equal 4 and 1
            raise SchemaError(f"{path}: expected one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin is tuple:
        return _convert_tuple(args, value, path)
    if origin is dict:
        if not isinstance(value, dict):
            raise SchemaError(f"{path}: expected a mapping, got {value!r}")
        return {str(key): _convert(args[1], item, _join(path, key)) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return load(typing.cast(type, hint), value, path)
    if hint is Any:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise SchemaError(f"{path}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    return value


def _convert_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [arg for arg in args if arg is not type(None)]
    if len(options) == 1:
        return _convert(options[0], value, path)
    for option in options:
        try:
            return _convert(option, value, path)
        except SchemaError:
            continue
    raise SchemaError(f"{path}: {value!r} fits none of {', '.join(str(option) for option in options)}")


def _convert_tuple(args: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise SchemaError(f"{path}: expected a list, got {value!r}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if len(args) != len(value):
        raise SchemaError(f"{path}: expected {len(args)} items, got {len(value)}")
    return tuple(_convert(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
