"""The name of the cache argument of models, layers and ``generate``, and of the cache in outputs.

From transformers 5.24 on, it is ``cache`` everywhere. Before, it was ``past_key_values`` in models, ``generate`` and
outputs, and ``cache_params`` in linear-attention layers; 5.24 accepts the old names with a warning. This package passes
a cache by the name that the installed version prefers, so it never causes that warning, and accepts all three names
from users.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from . import seams

NAMES = ("cache", "past_key_values", "cache_params")


def name_in(function: Callable[..., Any]) -> str | None:
    """The name of a function's cache argument, or None."""
    parameters = inspect.signature(function).parameters
    return next((name for name in NAMES if name in parameters), None)


@functools.cache
def name() -> str:
    """The name of the cache argument of models and ``generate`` in the installed transformers."""
    return name_in(seams.generation_class().prepare_inputs_for_generation) or NAMES[0]


def as_argument(cache: Any) -> dict[str, Any]:
    """Keyword arguments that pass a cache to a model or to ``generate``: ``model(ids, **as_argument(cache))``."""
    return {name(): cache}


def as_layer_argument(layer: Any, cache: Any) -> dict[str, Any]:
    """Keyword arguments that pass a cache to a linear-attention layer, patched or not."""
    return {name_in(type(layer).forward) or NAMES[0]: cache}


def take(arguments: dict[str, Any], found: Any = None) -> Any:
    """Remove the cache, under any of its names, from keyword arguments and return it; None if there is none.

    Args:
        arguments: keyword arguments; changed in place.
        found: a cache that was passed in another way, or None.

    Raises:
        TypeError: two different caches were passed.
    """
    for candidate in NAMES:
        value = arguments.pop(candidate, None)
        if value is not None and found is not None and value is not found:
            raise TypeError(f"expected one cache, as {name()!r}; got two under different names of {', '.join(NAMES)}")
        found = value if found is None else found
    return found


def look(arguments: dict[str, Any]) -> Any:
    """Return the cache among keyword arguments, under any of its names; None if there is none."""
    return next((arguments[key] for key in NAMES if arguments.get(key) is not None), None)


def of_outputs(outputs: Any) -> Any:
    """The cache in the outputs of a model or of ``generate``; None if there is none."""
    return getattr(outputs, name(), None)
