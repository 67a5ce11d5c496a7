"""Swap attributes of classes and restore them, safely under interruption.

No progress is stored. The current value of an attribute tells whether its swap has been applied, so going from one set
of swaps to another can be repeated or reversed from any point of interruption.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..log import logger, warn_once
from ..upstream import modules

MISSING: Any = object()  # stands for an attribute that a class does not define itself


@dataclass(frozen=True)
class Swap:
    """An attribute of a class or an item of a dict, its original value (MISSING if there is none), its replacement."""

    cls: Any
    name: str
    original: Any
    replacement: Any


def class_attribute(cls: Any, name: str) -> Any:
    """The attribute that a class defines itself, not one it inherits, or a dict's item; MISSING if there is none."""
    return (cls if isinstance(cls, dict) else cls.__dict__).get(name, MISSING)


def _put(cls: Any, name: str, value: Any) -> None:
    """Set an attribute or an item; MISSING deletes it."""
    if isinstance(cls, dict):
        if value is MISSING:
            del cls[name]
        else:
            cls[name] = value
    elif value is MISSING:
        delattr(cls, name)
    else:
        setattr(cls, name, value)


def describe(function: Any) -> str:
    """Module and qualified name of a function, for messages."""
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


def _value_after_swap(value: Any, old: Swap | None, new: Swap | None) -> Any:
    """The value of an attribute after `old` is undone and `new` applied; any value not set by them is kept."""
    if old is not None and old is not new and value is old.replacement:
        value = old.original
    if new is not None and value is new.original:
        value = new.replacement
    return value


def _by_place(swaps: Iterable[Swap]) -> dict[tuple[int, str], Swap]:
    return {(id(swap.cls), swap.name): swap for swap in swaps}


def apply_swaps(old: Iterable[Swap], new: Iterable[Swap]) -> None:
    """Undo the swaps of `old` that are not in `new`, then apply those of `new`.

    An attribute that another library has replaced since is left in place and a warning is logged.
    """
    before, after = _by_place(old), _by_place(new)
    changes = {
        place: (before.get(place), after.get(place))
        for place in {**before, **after}
        if before.get(place) is not after.get(place)
    }
    forwards = {}
    for (_, name), (previous, wanted) in changes.items():
        cls = (wanted or previous).cls  # type: ignore[union-attr]
        if name == "forward":
            forwards[cls] = previous, wanted
        here = class_attribute(cls, name)
        value = _value_after_swap(here, previous, wanted)
        if value is not here:
            _put(cls, name, value)
        elif wanted is None and previous is not None and here is not previous.original:
            logger.warning(
                "%s.%s was replaced by %s after hf_gdn patched it; the replacement is left in place",
                getattr(cls, "__name__", type(cls).__name__),
                name,
                describe(here),
            )
    _update_bound_instances(forwards)


def _update_bound_instances(changes: dict[type, tuple[Swap | None, Swap | None]]) -> None:
    """Update forwards that are bound to instances. Adding or removing accelerate's hooks, and kernelize(), bind them.

    All classes share one walk over all objects, which takes tens of milliseconds in a large process.
    """
    if not changes:
        return
    for instance in gc.get_referrers(*changes):
        for cls, (previous, wanted) in changes.items():
            if not isinstance(instance, cls):
                continue
            for name in modules.HELD_FORWARDS:
                function = getattr(instance.__dict__.get(name), "__func__", None)
                moved = _value_after_swap(function, previous, wanted)
                if moved is not function:
                    instance.__dict__[name] = moved.__get__(instance)
            theirs = foreign_forward(instance, wanted)
            if theirs is not None:
                warn_once(
                    f"some {cls.__name__} instances have their own forward, {theirs}, which runs instead of hf_gdn's "
                    "(kernelize() and use_kernels=True bind one if the hub has a kernel for the device)"
                )


def foreign_forward(instance: Any, swap: Swap | None) -> str | None:
    """Describe the forward that another library bound to an instance and that runs instead of its class's; or None.

    If accelerate has wrapped the forward, the unwrapped one is examined.
    """
    held = modules.unwrapped_forward(instance)
    function: Callable[..., Any] | None = getattr(held, "__func__", held)
    if swap is None or function is None or function is swap.replacement:
        return None
    return describe(function)
