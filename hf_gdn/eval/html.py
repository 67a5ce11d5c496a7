"""The report as one self-contained HTML page: verdict first, plots with their tables behind them, the manifest last."""

from __future__ import annotations

from dataclasses import replace

from jinja2 import Environment, PackageLoader, StrictUndefined

from . import plots, summary, tables
from .results import ModelResult, Report


def _tiles(result: ModelResult) -> list[tuple[str, str]]:
    """The few figures to be seen first."""
    tiles = []
    factors = summary.speedups(result)
    if factors:
        low, high = f"{min(factors):.2f}", f"{max(factors):.2f}"
        tiles.append(("generation speed", f"{low}×" if low == high else f"{low}–{high}×"))
    if result.parity is not None:
        rows = [row.statistics for row in result.parity.deciding()]
        furthest = max(rows, key=lambda row: abs(row.ppl_ratio.value - 1))
        tiles.append(("perplexity ratio, furthest from 1", f"{furthest.ppl_ratio.value:.7f}"))
        tiles.append(("mean KL divergence, largest", tables.number(max(row.kl_mean.value for row in rows), 4)))
        tiles.append(("same top token, least", f"{min(row.same_top.value for row in rows):.2f} %"))
    if result.stream is not None:
        sinks, dense = result.stream.ways["sinks"], result.stream.ways["dense"]
        tiles.append(("perplexity with sinks, to that of the training length", f"{sinks.ratio:.3f}"))
        if sinks.bytes is not None and dense.bytes is not None:
            tiles.append(("cache with sinks, of all tokens'", f"{sinks.bytes / dense.bytes:.0%}"))
    if result.training is not None:
        part = result.training
        tiles.append(("training step, speed-up", f"{part.speedup.median:.2f}×"))
        tiles.append(("memory of a step, of the original's", f"{part.patched.peak_mib / part.original.peak_mib:.0%}"))
        tiles.append(("loss, largest relative difference", tables.number(max(part.loss_differences()), 2)))
    return tiles


def to_html(report: Report) -> str:
    """The report as a page that loads nothing from anywhere."""
    environment = Environment(
        loader=PackageLoader("hf_gdn.eval", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    models = [
        {
            "name": result.model,
            "tiles": _tiles(result),
            "plots": plots.plots(result),
            "tables": tables.of_model(result),
            "details": tables.details(result),
        }
        for result in report.results
    ]
    return environment.get_template("report.html.jinja").render(
        report=report,
        verdict=summary.verdict(report),
        models=models,
        tables=tables.of_report(replace(report, results=[])),
        conditions=summary.conditions(report),
    )
