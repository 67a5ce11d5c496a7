"""Verdicts of comparisons, and their bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UserError

Bounds = dict[str, float] | None


@dataclass(frozen=True)
class Verdict:
    """``"same"``, ``"close"``, ``"different"`` or ``"not finite"``, and in words what was beyond its bound."""

    grade: str
    why: str = ""


def bounds(defaults: dict[str, float], changes: tuple[str, ...] = ()) -> dict[str, float]:
    """Bounds with changes like ``"kl_mean=1e-3"``. Raises UserError for one that is none, negative or NaN."""
    found = dict(defaults)
    for change in changes:
        name, _, value = change.partition("=")
        if name not in found:
            raise UserError(f"--tolerance {change}: no bound {name!r}; bounds: {', '.join(found)}")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise UserError(f"--tolerance {change}: expected NAME=NUMBER, e.g. {name}=1e-3") from error
        if not found[name] >= 0:  # which NaN is not either
            raise UserError(f"--tolerance {change}: a bound must be at least 0, got {value}")
    return found


def graded(beyond: Callable[[dict[str, float]], list[str]], tolerance: dict[str, float], near: Bounds) -> Verdict:
    """The verdict of a finite comparison.

    Args:
        beyond: takes bounds; says in words what is beyond them.
        tolerance: the bounds.
        near: those of bfloat16, within which a result is still close; None for a dtype without a "close".
    """
    found = beyond(tolerance)
    if not found:
        return Verdict("same")
    return Verdict("close" if near is not None and not beyond(near) else "different", "; ".join(found))
