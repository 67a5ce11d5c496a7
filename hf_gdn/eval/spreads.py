"""Figures of what was timed in turns."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Of what was timed in turns."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class TailSpread(Spread):
    """With the 90th percentile."""

    p90: float


def spread(values: list[float]) -> Spread:
    """Median, lowest and highest."""
    return Spread(statistics.median(values), min(values), max(values))
