"""What a cache is called: by models, layers, ``generate`` and outputs.

From transformers 5.24 on it is ``cache`` everywhere. Before, models, ``generate`` and outputs called it
``past_key_values`` and linear-attention layers ``cache_params``; 5.24 takes the old names with a warning. Code of this
package passes a cache by the name that the installed version prefers, so that no such warning is ours, and accepts all
three from users.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from . import seams

NAMES = ("cache", "past_key_values", "cache_params")


def name_in(function: Callable[..., Any]) -> str | None:
    """The name under which a function takes a cache, None when it takes none."""
    parameters = inspect.signature(function).parameters
    return next((name for name in NAMES if name in parameters), None)


@functools.cache
def name() -> str:
    """The name under which the installed transformers' models and ``generate`` take a cache."""
    return name_in(seams.generation_class().prepare_inputs_for_generation) or NAMES[0]


def as_argument(cache: Any) -> dict[str, Any]:
    """Keyword arguments that pass a cache to a model or to ``generate``: ``model(ids, **as_argument(cache))``."""
    return {name(): cache}


def as_layer_argument(layer: Any, cache: Any) -> dict[str, Any]:
    """Keyword arguments that pass a cache to a linear-attention layer, patched or not."""
    return {name_in(type(layer).forward) or NAMES[0]: cache}


def take(arguments: dict[str, Any], found: Any = None) -> Any:
    """Remove the cache from keyword arguments and return it, whatever it is called; None when there is none.

    Args:
        arguments: keyword arguments; changed in place.
        found: a cache that was given otherwise.

    Raises:
        TypeError: two different caches were given under two names.
    """
    for candidate in NAMES:
        value = arguments.pop(candidate, None)
        if value is not None and found is not None and value is not found:
            raise TypeError(f"two caches were given, as {' and '.join(NAMES)}; expected one, as {name()!r}")
        found = value if found is None else found
    return found


def look(arguments: dict[str, Any]) -> Any:
    """The cache among keyword arguments, whatever it is called; None when there is none."""
    return next((arguments[key] for key in NAMES if arguments.get(key) is not None), None)


def of_outputs(outputs: Any) -> Any:
    """The cache that a model or ``generate`` returned with its outputs; None when it returned none."""
    return getattr(outputs, name(), None)
