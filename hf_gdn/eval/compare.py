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
from . import job, machine, tables

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


def load(path: str) -> dict[str, Any]:
    """A report.json. Raises UserError when it is none, or of another layout."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"report {path!r} cannot be read: {reason(error)}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != job.SCHEMA:
        raise UserError(f"report {path!r} has schema version {schema}; this hf_gdn reads version {job.SCHEMA}")
    return found


def figures(found: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """All figures of a report by a name of their own."""
    for result in found["results"]:
        yield f"{result['model']}: passed", Figure(float(result["passed"]), "higher")
        for row in result.get("parity", {}).get("comparisons", []):
            name = f"{result['model']}, {row['name']}"
            yield f"{name}: same model", Figure(float(row["grade"] == "same"), "higher" if row["decides"] else "")
            for statistic in ("ppl_original", "ppl_patched", "kl_mean"):
                yield f"{name}: {statistic}", Figure(row["statistics"][statistic]["value"])
        for cell in result.get("speed", {}).get("cells", []):
            name = f"{result['model']}, {tables.cell_name(cell)}"
            yield f"{name}: counts", Figure(float(cell["counts"]), "higher")
            if "failed" in cell:
                continue
            for measure, better in _SIDES.items():
                value = cell["patched"][measure]
                value = value["median"] if isinstance(value, dict) else value
                yield f"{name}: {measure}", Figure(value, better)
            for measure, factor in cell["speedup"].items():
                yield f"{name}: speed-up of {measure}", Figure(factor["median"], "higher")
    for row in found.get("kernels", []):
        name = tables.kernel_name(row)
        yield f"{name}: passed", Figure(float(row["passed"] is True), "higher")
        yield f"{name}: ms", Figure(row["ms"], "lower")
        yield f"{name}: extra_mib", Figure(row["extra_mib"], "lower")


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


def changes(before: dict[str, Any], after: dict[str, Any], tolerance: float) -> list[Change]:
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
    if a["kind"] != b["kind"]:
        raise UserError(f"reports differ in kind: {before!r} is of kind {a['kind']!r}, {after!r} of {b['kind']!r}")
    console = machine.console()
    for part in ("machine", "versions"):
        differing = [
            f"{name} {a[part].get(name)} → {b[part].get(name)}"
            for name in {**a[part], **b[part]}
            if a[part].get(name) != b[part].get(name)
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
