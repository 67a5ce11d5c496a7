"""Read a tensor's values once. On a GPU this is a host sync, and every layer of a model needs the same values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .upstream import tensors

T = TypeVar("T")


def read_once(function: Callable[..., T]) -> Callable[..., T]:
    """Cache the result of ``function(tensor, *rest)`` until the tensor is modified or freed, or `rest` changes.

    With ``copy=``, a tensor of the same values on the host, that one is read instead.
    Exceptions are not cached. Tensors created in inference mode have no version counter that shows modifications, so
    they are read on every call.
    """
    known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @functools.wraps(function)
    def call(tensor: Tensor, *rest: Any, copy: Tensor | None = None) -> T:
        source = tensor if copy is None else copy
        if tensor.is_inference():
            return function(source, *rest)
        key = (tensors.version(tensor), *rest)
        found = known.get(tensor)
        if found is None or found[0] != key:
            found = known[tensor] = (key, function(source, *rest))
        return found[1]

    return call
