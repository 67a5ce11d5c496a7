"""A report in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import summary, tables
from .results import Report


def console() -> Console:
    """Standard output, wide enough for tables where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 160)


def show(report: Report, folder: str, files: Iterable[str], quiet: bool) -> None:
    """Print the report and where its files are; when quiet, its verdict alone."""
    out = console()
    if not quiet:
        for table in tables.of_report(report):
            shown = Table(
                *table.header, title=table.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
            )
            for row in table.rows:
                shown.add_row(*map(escape, row))
            out.print(shown)
        for name, value in summary.conditions(report):
            out.print(f"{name}: {value}", style="dim", highlight=False, markup=False)
    style = "bold green" if report.passed else "bold red"
    out.print(summary.verdict(report), style=style, highlight=False, markup=False)
    names = ", ".join(str(Path(folder) / name) for name in files)
    out.print(f"wrote {names}", highlight=False, markup=False)
