"""Two reports side by side: what changed, and is any of it a regression?

A regression is: a verdict that held and holds no more, a figure that is gone, or a time, speed-up or memory figure that
is worse by more than the tolerance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..errors import UserError, reason
from . import tables, terminal
from .records import read
from .results import SCHEMA, Report
from .spreads import Spread
from .training_results import Training

# Figures of a speed cell's sides and which way is better; `first_call_s` is shown without being judged.
_SIDES = {
    "ttft_ms": "lower",
    "tpot_ms": "lower",
    "decode_tokens_s": "higher",
    "generate_tokens_s": "higher",
    "peak_mib": "lower",
    "first_call_s": "",
}


@dataclass(frozen=True)
class Figure:
    """A figure of a report; `better` is "higher", "lower", or "" when it is not judged."""

    value: float | None
    better: str = ""


def load(path: str) -> Report:
    """A report.json. Raises UserError when it is none, or of another layout."""
    try:
        found: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"report {path!r} cannot be read: {reason(error)}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise UserError(f"report {path!r} has schema version {schema}; this hf_gdn reads version {SCHEMA}")
    try:
        return read(Report, found)
    except (KeyError, TypeError) as error:
        raise UserError(f"report {path!r} is damaged: {reason(error)}") from error


def figures(report: Report) -> Iterator[tuple[str, Figure]]:
    """All figures of a report by a name of their own."""
    for result in report.results:
        yield f"{result.model}: passed", Figure(float(result.passed), "higher")
        for row in result.comparisons():
            name = f"{result.model}, {row.name}"
            yield f"{name}: same model", Figure(float(row.grade == "same"), "higher" if row.decides else "")
            for statistic in ("ppl_original", "ppl_patched", "kl_mean"):
                yield f"{name}: {statistic}", _figure(row.statistics.estimates()[statistic].value)
        for cell in result.cells():
            name = f"{result.model}, {cell.name}"
            yield f"{name}: counts", Figure(float(cell.counts), "higher")
            if cell.patched is None:
                continue
            for measure, better in _SIDES.items():
                value = getattr(cell.patched, measure)
                yield f"{name}: {measure}", _figure(value.median if isinstance(value, Spread) else value, better)
            for measure, factor in cell.speedups().items():
                yield f"{name}: speed-up of {measure}", _figure(factor.median, "higher")
        for way, found in ({} if result.stream is None else result.stream.ways).items():
            name = f"{result.model}, stream, {way}"
            yield f"{name}: ratio", _figure(found.ratio, "lower")
            yield f"{name}: tokens_s", _figure(found.tokens_s, "higher")
        if result.training is not None:
            yield from _training_figures(f"{result.model}, training", result.training)
    for kernel in report.kernels or []:
        yield f"{kernel.name}: passed", Figure(float(kernel.passed is True), "higher")
        yield f"{kernel.name}: ms", _figure(kernel.ms, "lower")
        yield f"{kernel.name}: extra_mib", _figure(kernel.extra_mib, "lower")
    for layer in report.layers or []:
        ours = layer.budget is not None  # not the original's time, nor that of the projections
        yield f"{layer.name}: passed", Figure(float(layer.passed is not False), "higher")
        yield f"{layer.name}: ms", _figure(layer.ms, "lower" if ours else "")
        if ours:
            yield f"{layer.name}: speedup", _figure(layer.speedup, "higher")


def _training_figures(name: str, part: Training) -> Iterator[tuple[str, Figure]]:
    yield f"{name}: same training", Figure(float(part.passed), "higher")
    yield f"{name}: ppl_after", _figure(part.patched.ppl_after)
    yield f"{name}: step_ms", _figure(part.patched.step_ms.median, "lower")
    yield f"{name}: speed-up", _figure(part.speedup.median, "higher")
    yield f"{name}: peak_mib", _figure(part.patched.peak_mib, "lower")


def _figure(value: float | None, better: str = "") -> Figure:
    return Figure(None if value is None or math.isnan(value) else value, better)


@dataclass(frozen=True)
class Change:
    """A figure of both reports; `verdict` is "", "better", "REGRESSION", "GONE" or "new"."""

    name: str
    before: float | None
    after: float | None
    verdict: str

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after / self.before if self.before and self.after is not None else math.nan


def _verdict(before: Figure, after: Figure, tolerance: float) -> str:
    if not before.better or before.value is None:
        return ""
    if after.value is None:
        return "GONE"
    if before.value == 0:
        gain = float(after.value > 0) if before.better == "higher" else -float(after.value > 0)
    else:
        gain = after.value / before.value - 1 if before.better == "higher" else 1 - after.value / before.value
    return "REGRESSION" if gain < -tolerance else "better" if gain > tolerance else ""


def changes(before: Report, after: Report, tolerance: float) -> list[Change]:
    """Every figure of two reports; `tolerance` is the share by which one may be worse."""
    old, new = dict(figures(before)), dict(figures(after))
    found = []
    for name, figure in old.items():
        other = new.get(name)
        if other is None:
            found.append(Change(name, figure.value, None, "GONE"))
        else:
            found.append(Change(name, figure.value, other.value, _verdict(figure, other, tolerance)))
    return found + [Change(name, None, figure.value, "new") for name, figure in new.items() if name not in old]


def main(before: str, after: str, tolerance: float) -> bool:
    """Print two reports side by side. Returns whether the second is no regression."""
    a, b = load(before), load(after)
    if a.kind != b.kind:
        raise UserError(f"reports differ in kind: {before!r} is of kind {a.kind!r}, {after!r} of {b.kind!r}")
    console = terminal.console()
    for part, old, new in (("machine", a.machine, b.machine), ("versions", a.versions, b.versions)):
        differing = [
            f"{name} {old.get(name)} → {new.get(name)}" for name in {**old, **new} if old.get(name) != new.get(name)
        ]
        if differing:
            console.print(f"{part}: {', '.join(differing)}", highlight=False, markup=False)
    found = changes(a, b, tolerance)
    table = Table("", "before", "after", "after / before", "", title=f"{before} → {after}", title_justify="left")
    for change in found:
        style = {"REGRESSION": "red", "GONE": "red", "better": "green"}.get(change.verdict)
        cells = (tables.number(change.before), tables.number(change.after), f"{change.ratio:.3f}", change.verdict)
        table.add_row(escape(change.name), *cells, style=style)
    console.print(table)
    bad = [change.name for change in found if change.verdict in ("REGRESSION", "GONE")]
    console.print(
        f"{len(bad)} regressions beyond {tolerance:.0%}: {'; '.join(bad)}" if bad else "no regression",
        style="bold red" if bad else "bold green",
        highlight=False,
        markup=False,
    )
    return not bad
