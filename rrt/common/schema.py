"""Strict reading of JSON and TOML into frozen dataclasses: unknown keys and wrong types are refused by name."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, TypeVar

from rrt.errors import UserError

T = TypeVar("T")


def field_doc(text: str, **kwargs: Any) -> Any:
    """Declare a dataclass field with a one-line description, which commands print as ``--help``."""
    return field(metadata={"doc": text}, **kwargs)


def _type_name(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else _type_name(a) for a in typing.get_args(kind))
    if origin is tuple:
        return f"a list of {_type_name(typing.get_args(kind)[0])}"
    if origin is Mapping:
        return f"an object with values of type {_type_name(typing.get_args(kind)[1])}"
    return str(getattr(kind, "__name__", kind))


def _convert(value: Any, kind: Any, where: str, name: str) -> Any:
    """Convert `value` to type `kind`; JSON and TOML lists become tuples, and integers may stand for floats."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for option in args:
            try:
                return _convert(value, option, where, name)
            except UserError as error:
                if dataclasses.is_dataclass(option) and isinstance(value, dict):
                    raise error
    elif origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(item, args[0], where, f"{name}[{i}]") for i, item in enumerate(value))
    elif origin is Mapping:
        if isinstance(value, dict):
            return {key: _convert(item, args[1], where, f"{name}.{key}") for key, item in value.items()}
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return from_mapping(typing.cast(type, kind), value, where, prefix=f"{name}.")
        if isinstance(value, typing.cast(type, kind)):
            return value
    elif kind is type(None):
        if value is None:
            return None
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{where}: field '{name}': found {value!r}; expected {_type_name(kind)}")


def from_mapping(cls: type[T], data: dict[str, Any], where: str, prefix: str = "") -> T:
    """Build the dataclass `cls` from parsed JSON or TOML.

    Args:
        where: what to name in errors, usually the file's path.
        prefix: dotted path of `data` inside the file, ending in a dot, for errors.

    Raises:
        UserError: an unknown key, a missing one, or a value of the wrong type or range.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(fields))
    if unknown:
        names = ", ".join(repr(prefix + name) for name in unknown)
        raise UserError(f"{where}: unknown field {names}; expected one of: {', '.join(fields)}")
    required = [
        f.name for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in data]
    if missing:
        raise UserError(f"{where}: missing field " + ", ".join(f"'{prefix}{name}'" for name in missing))
    values = {k: _convert(v, hints[k], where, f"{prefix}{k}") for k, v in data.items()}
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def to_mapping(value: Any) -> dict[str, Any]:
    """Convert a configuration to JSON's types: nested dataclasses become objects, tuples lists."""
    return dataclasses.asdict(value)
