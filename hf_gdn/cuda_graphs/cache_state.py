"""Compare and restore the raw state of a cache, for code that depends on tensor addresses.

The state of a cache is in the attributes of its layers, and in those attributes that are dicts. These functions treat
tensors and plain values alike and work with any class of layers.
"""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
Attributes = dict[Any, Any]


def attributes(cache: Cache) -> list[Attributes]:
    """The attribute dicts of all layers, and all dicts in them; these are the cache's own dicts, not copies."""
    found: list[Attributes] = [vars(layer) for layer in cache.layers]
    for part in found:
        found += [value for value in part.values() if isinstance(value, dict)]
    return found


def changed(now: list[Attributes], before: list[Attributes]) -> Any:
    """Name of an attribute that changed; None if none did. `before` has copies of the dicts in `now`."""
    if len(now) != len(before):
        return "layers"
    for part, old in zip(now, before):
        if [*part] == [*old] and all(map(is_, part.values(), old.values())):
            continue  # fast path
        if part.keys() != old.keys():
            return next(iter(part.keys() ^ old.keys()))
        for name, was in old.items():
            value = part[name]
            if value is not was and not (type(value) is type(was) and isinstance(was, PLAIN) and value == was):
                return name
    return None


def put_back(now: list[Attributes], before: list[Attributes]) -> None:
    """Restore the attributes from the copies in `before`."""
    for part, old in zip(now, before):
        part.clear()
        part.update(old)


def layout(cache: Cache) -> tuple[Any, ...]:
    """Everything about a cache but the contents of its tensors. Caches of the same layout are interchangeable."""
    seen: dict[int, int] = {}

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.stride(), value.dtype, value.device, seen.setdefault(id(value), len(seen))
        if isinstance(value, dict):
            return dict
        return (type(value), value) if isinstance(value, PLAIN) else id(value)

    parts = [tuple((name, describe(value)) for name, value in part.items()) for part in attributes(cache)]
    return type(cache), *map(type, cache.layers), *parts
