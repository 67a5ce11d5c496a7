"""The report as one self-contained HTML page: verdict first, plots with their tables behind them, the manifest last."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from . import plots, tables, writers
from .tables import TextTable


def _tiles(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The few figures to be seen first."""
    tiles = []
    factors = writers.speedups(result)
    if factors:
        low, high = f"{min(factors):.2f}", f"{max(factors):.2f}"
        tiles.append(("generation speed", f"{low}×" if low == high else f"{low}–{high}×"))
    if "parity" in result:
        rows = [row["statistics"] for row in result["parity"]["comparisons"] if row["decides"]]
        furthest = max(rows, key=lambda row: abs((row["ppl_ratio"]["value"] or 0) - 1))
        tiles.append(("perplexity ratio, furthest from 1", f"{furthest['ppl_ratio']['value']:.7f}"))
        tiles.append(("mean KL divergence, largest", tables.number(max(row["kl_mean"]["value"] for row in rows), 4)))
        tiles.append(("same top token, least", f"{min(row['same_top']['value'] for row in rows):.2f} %"))
    return tiles


def to_html(report: dict[str, Any]) -> str:
    """The report as a page that loads nothing from anywhere."""
    environment = Environment(
        loader=PackageLoader("hf_gdn.eval", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    models = []
    for result in report["results"]:
        more = [tables.statistics_sheet(result)] if "parity" in result else []
        more += [tables.spread_sheet(result)] if "speed" in result else []
        more.append(TextTable("Kernels by layer", ("layer", "patched"), list(result["kernels"].items())))
        models.append(
            {
                "name": result["model"],
                "tiles": _tiles(result),
                "plots": plots.plots(result),
                "sheets": tables.of_report({"results": [result]}),
                "more": more,
            }
        )
    kernels = tables.of_report({**report, "results": []})
    return environment.get_template("report.html.jinja").render(
        report=report,
        verdict=writers.verdict(report),
        models=models,
        kernels=kernels,
        conditions=writers.conditions(report),
    )
