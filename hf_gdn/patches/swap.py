"""Swapping attributes of classes and putting them back, so that whatever is raised half-way leaves all or nothing.

Nothing here keeps a record of how far it has come: what an attribute is says whether its swap has been made, so that a
move from one set of swaps to another can be run again, or back, from wherever it was interrupted.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..log import logger, warn_once
from ..upstream import modules

MISSING: Any = object()  # what a class has that does not have an attribute itself


@dataclass(frozen=True)
class Swap:
    """An attribute of a class: what stood there (MISSING for nothing) and what is to stand there."""

    cls: type
    name: str
    original: Any
    replacement: Any


def own(cls: type, name: str) -> Any:
    """A class's own attribute, MISSING where it has none."""
    return cls.__dict__.get(name, MISSING)


def describe(function: Any) -> str:
    """Where a function is from, for messages."""
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


def _moved(value: Any, old: Swap | None, new: Swap | None) -> Any:
    """What an attribute becomes when `new` follows `old`; what is neither's stays."""
    if old is not None and old is not new and value is old.replacement:
        value = old.original
    if new is not None and value is new.original:
        value = new.replacement
    return value


def _by_place(swaps: Iterable[Swap]) -> dict[tuple[type, str], Swap]:
    return {(swap.cls, swap.name): swap for swap in swaps}


def move(old: Iterable[Swap], new: Iterable[Swap]) -> None:
    """Undo the swaps of `old` that are not in `new`, make those of `new`.

    An attribute that somebody else has replaced since is left in place, and a warning says so.
    """
    before, after = _by_place(old), _by_place(new)
    changes = {
        place: (before.get(place), after.get(place))
        for place in {**before, **after}
        if before.get(place) is not after.get(place)
    }
    for (cls, name), (gone, come) in changes.items():
        here = own(cls, name)
        value = _moved(here, gone, come)
        if value is MISSING and here is not MISSING:
            delattr(cls, name)
        elif value is not here:
            setattr(cls, name, value)
        elif come is None and gone is not None and here is not gone.original:
            logger.warning(
                "%s.%s was replaced by %s after hf_gdn patched it; that one is left in place",
                cls.__name__,
                name,
                describe(here),
            )
    _tell_instances({cls: pair for (cls, name), pair in changes.items() if name == "forward"})


def _tell_instances(changes: dict[type, tuple[Swap | None, Swap | None]]) -> None:
    """Move the forwards that instances hold themselves: accelerate's hooks, and what removes them, and kernelize()
    leave the one they found in the instance.

    One walk over all objects for all classes: it takes tens of milliseconds in a large process.
    """
    if not changes:
        return
    for instance in gc.get_referrers(*changes):
        for cls, (gone, come) in changes.items():
            if not isinstance(instance, cls):
                continue
            for name in modules.HELD_FORWARDS:
                function = getattr(instance.__dict__.get(name), "__func__", None)
                moved = _moved(function, gone, come)
                if moved is not function:
                    instance.__dict__[name] = moved.__get__(instance)
            theirs = foreign_forward(instance, come)
            if theirs is not None:
                warn_once(
                    f"some {cls.__name__} hold a forward of their own, {theirs}: that one runs, not hf_gdn's "
                    "(kernelize() and use_kernels=True bind one where the hub has a kernel for the device)"
                )


def foreign_forward(instance: Any, swap: Swap | None) -> str | None:
    """The forward that an instance was given by somebody else and runs instead of its patched class's, or None.

    A forward that accelerate has wrapped is looked at as it was before.
    """
    held = modules.unwrapped_forward(instance)
    function: Callable[..., Any] | None = getattr(held, "__func__", held)
    if swap is None or function is None or function is swap.replacement:
        return None
    return describe(function)
