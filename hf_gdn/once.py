"""Reading a tensor's values once: on a GPU the host waits for them, and every layer of a model asks the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .upstream import tensors

T = TypeVar("T")


def read_once(function: Callable[..., T]) -> Callable[..., T]:
    """Keep what ``function(tensor, *rest)`` returns while the tensor lives, is not written to and `rest` is the same.

    What it raises is raised again. Tensors made in inference mode have no version to tell a change by and are read
    every time.
    """
    known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @functools.wraps(function)
    def call(tensor: Tensor, *rest: Any) -> T:
        if tensor.is_inference():
            return function(tensor, *rest)
        key = (tensors.version(tensor), *rest)
        found = known.get(tensor)
        if found is None or found[0] != key:
            found = known[tensor] = (key, function(tensor, *rest))
        return found[1]

    return call
