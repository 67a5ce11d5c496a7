"""Dataclasses as JSON and back."""

from __future__ import annotations

import functools
import math
import types
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def absent() -> Any:
    """A field that is None, and then not in the JSON, unless it is given."""
    return field(default=None, metadata={"absent": True})


def as_dict(value: Any) -> Any:
    """JSON of a result: dicts, lists and plain values, still with NaN."""
    if is_dataclass(value):
        found = {}
        for part in fields(value):
            held = getattr(value, part.name)
            if held is not None or not part.metadata.get("absent"):
                found[part.name] = as_dict(held)
        return found
    if isinstance(value, dict):
        return {name: as_dict(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_dict(part) for part in value]
    return value


@functools.cache
def _types(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def read(cls: type[T], found: Any) -> T:
    """A result from its JSON, null as NaN where a figure is always a number. Unknown keys are ignored.

    Raises:
        KeyError: a key is missing; TypeError: something else stands where it should be.
    """
    return _read(cls, found)


def _read(kind: Any, found: Any) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
        return None if found is None else _read(kind, found)
    if is_dataclass(kind):
        cls: Any = kind
        if not isinstance(found, dict):
            raise TypeError(f"expected an object, got {found!r}")
        given = [part for part in fields(cls) if part.name in found or _required(part)]
        return cls(**{part.name: _read(_types(cls)[part.name], found[part.name]) for part in given})
    if origin is list:
        return [_read(get_args(kind)[0], part) for part in found]
    if origin is dict:
        return {name: _read(get_args(kind)[1], part) for name, part in found.items()}
    return math.nan if kind is float and found is None else found


def _required(part: Any) -> bool:
    return part.default is MISSING and part.default_factory is MISSING
