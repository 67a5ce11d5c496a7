"""Compare and restore the raw state of a cache, for code that depends on tensor addresses.

A cache's state is in the attributes of its layers and in the dicts among them; this works on those as they are, tensors
and plain values alike, whatever class a layer has.
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
    """The attributes of all layers, and the dicts in them: the cache's own dicts, not copies."""
    found: list[Attributes] = [vars(layer) for layer in cache.layers]
    for part in found:
        found += [value for value in part.values() if isinstance(value, dict)]
    return found


def changed(now: list[Attributes], before: list[Attributes]) -> Any:
    """Name of an attribute that is another object or has another value than `before`, in copies, or None."""
    if len(now) != len(before):
        return "layers"
    for part, old in zip(now, before):
        if [*part] == [*old] and all(map(is_, part.values(), old.values())):
            continue  # most often
        if part.keys() != old.keys():
            return next(iter(part.keys() ^ old.keys()))
        for name, was in old.items():
            value = part[name]
            if value is not was and not (type(value) is type(was) and isinstance(was, PLAIN) and value == was):
                return name
    return None


def put_back(now: list[Attributes], before: list[Attributes]) -> None:
    """Make the attributes what they were."""
    for part, old in zip(now, before):
        part.clear()
        part.update(old)


def layout(cache: Cache) -> tuple[Any, ...]:
    """All but the tensors' contents: caches of the same layout can take each other's place."""
    seen: dict[int, int] = {}

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.stride(), value.dtype, value.device, seen.setdefault(id(value), len(seen))
        if isinstance(value, dict):
            return dict
        return (type(value), value) if isinstance(value, PLAIN) else id(value)

    parts = [tuple((name, describe(value)) for name, value in part.items()) for part in attributes(cache)]
    return type(cache), *map(type, cache.layers), *parts
