"""hf-gdn compare: two reports."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import COMPARE, command


@command(
    panel=COMPARE,
    needs=("rich",),
    examples=["hf-gdn compare before/report.json after/report.json --tolerance 0.05"],
)
def compare(
    before: Annotated[str, typer.Argument(help="A report.json.")],
    after: Annotated[str, typer.Argument(help="Another report.json of the same kind.")],
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Relative slow-down that does not count as a regression.")
    ] = 0.05,
) -> None:
    """Two reports side by side. Exits 1 when the second is a regression."""
    from ..eval import compare

    if not compare.main(before, after, tolerance):
        raise typer.Exit(1)
