"""What the doctor found, as a table that can be pasted into a bug report, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..eval.machine import made_with
from ..patches import status
from .examine import CHECKED, NOT_SERVED, REFUSED, Finding

LAYOUT = 1


def serving(findings: Iterable[Finding]) -> set[int]:
    """The ids of the findings whose kernels "auto" chooses: the first of each kind of call that was checked."""
    first: dict[tuple[Any, ...], int] = {}
    for found in findings:
        row = found.row
        if found.state == CHECKED:
            first.setdefault((row.op, row.dtype, row.dims, row.beta_max), id(found))
    return set(first.values())


def as_json(findings: list[Finding], head: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Everything, for ``--json``; docs/gpu.md describes it."""
    chosen = serving(findings)
    kernels = [{**found.as_json(), "serves": id(found) in chosen} for found in findings]
    return {"layout": LAYOUT, **head, "seconds": round(seconds, 1), "passed": passed(findings), "kernels": kernels}


def passed(findings: Iterable[Finding]) -> bool:
    """Whether no kernel was refused."""
    return all(found.state != REFUSED for found in findings)


def head(command: str, device: Any) -> dict[str, Any]:
    """Machine, versions, and what is patched."""
    return {**made_with("doctor", command, device), "status": str(status())}


def show(findings: list[Finding], about: dict[str, Any], seconds: float, out: Console) -> None:
    """Print the machine, the table and the verdict."""
    for name, value in {**about["machine"], **about["versions"]}.items():
        if value != "not installed":
            out.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
    missing = [name for name, version in about["versions"].items() if version == "not installed"]
    out.print(f"not installed: {', '.join(missing) or 'nothing'}", highlight=False, markup=False, soft_wrap=True)
    columns = ("op", "backend", "dtype", "HK HV K V", "serves", "error", "allowed", "s", "more calls", "uses", "models")
    table = Table(*columns, title="hf_gdn kernels", title_justify="left", box=box.SIMPLE_HEAD)
    chosen = serving(findings)
    for found in findings:
        if found.state != NOT_SERVED:
            table.add_row(*map(escape, _cells(found, id(found) in chosen)))
    out.print(table)
    for sentence, kernels in _sentences(findings).items():
        out.print(f"{', '.join(kernels)}: {sentence}", highlight=False, markup=False, soft_wrap=True)
    refused = sum(found.state == REFUSED for found in findings)
    checked = sum(found.state == CHECKED for found in findings)
    verdict = f"FAILED: {refused} of {refused + checked} refused" if refused else f"PASSED: {checked} checked"
    out.print(f"{verdict}, {seconds:.0f} s", style="bold red" if refused else "bold green", highlight=False)


def _cells(found: Finding, serves: bool) -> list[str]:
    row, use = found.row, found.usage
    state = "REFUSED" if found.state == REFUSED else "yes" if serves else "if asked for"
    uses = f"{use['registers']} regs, {use['spills']} spilled, {use['shared'] // 1024} KiB" if use else ""
    further = f"{found.launches}, {found.captured} replayed" if found.launches else ""
    error, bound = ("" if x is None else f"{x:.1e}" for x in (found.error, found.bound))
    heads, names, seconds = " ".join(map(str, row.dims)), ", ".join(row.models), f"{found.seconds:.1f}"
    return [row.op, row.backend, row.dtype, heads, state, error, bound, seconds, further, uses, names]


def _sentences(findings: Iterable[Finding]) -> dict[str, list[str]]:
    """The reasons, each with the kernels it concerns."""
    found: dict[str, list[str]] = {}
    for finding in findings:
        if finding.reason is not None:
            row = finding.row
            heads = "" if finding.state == NOT_SERVED else f" {row.dtype} {row.dims}"
            names = found.setdefault(finding.reason, [])
            name = f"{row.backend} {row.op}{heads}"
            names += [] if name in names else [name]
    return found
