"""The files of a report: JSON, Markdown, CSV and HTML, and of long streams an SVG picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import html, plots, summary, tables
from .parity_results import Estimate
from .records import as_dict
from .results import ModelResult, Report
from .resume import put
from .spreads import Spread, TailSpread
from .training_results import Training


def to_json(report: Report) -> str:
    """The report as JSON; NaN and infinities, which JSON lacks, as null."""
    return json.dumps(_finite(as_dict(report)), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_markdown(report: Report) -> str:
    """The report as Markdown, to be pasted into a pull request."""
    lines = [f"# hf_gdn {report.kind}, {report.date}", "", f"**{summary.verdict(report)}**", ""]
    for table in tables.of_report(report):
        lines += [f"### {table.title}", "", "| " + " | ".join(table.header) + " |", "|" + "---|" * len(table.header)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows] + [""]
    lines += ["<details><summary>Machine, versions, kernels</summary>", ""]
    lines += [f"- {name}: {value}" for name, value in summary.conditions(report)] + ["", "</details>", ""]
    return "\n".join(lines)


CSV_HEADER = ("model", "section", "item", "side", "measure", "value", "error", "low", "high")
_KERNEL_FIGURES = ("ms", "tflop_s", "gb_s", "share_compute", "share_bandwidth", "speedup", "extra_mib", "first_ms")
_LAYER_FIGURES = ("ms", "speedup", "share_projections", "first_ms")


def to_csv(report: Report) -> str:
    """Every figure of the report, a row each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for result in report.results:
        writer.writerows((result.model, *row) for row in _model_rows(result))
    parts = (("kernels", report.kernels, _KERNEL_FIGURES), ("layers", report.layers, _LAYER_FIGURES))
    for section, rows, figures in parts:
        for row in rows or []:
            side = getattr(row, "backend", None) or getattr(row, "side", "")
            for name in figures:
                spread = (row.low, row.high) if name == "ms" else ("", "")
                writer.writerow((row.shape, section, row.name, side, name, getattr(row, name), "", *spread))
            writer.writerow((row.shape, section, row.name, side, "error", row.error, "", "", ""))
    return text.getvalue()


def _model_rows(result: ModelResult) -> Iterator[tuple]:
    for row in result.comparisons():
        for name, value in vars(row.statistics).items():
            found = value if isinstance(value, Estimate) else Estimate(value, None)
            yield "parity", row.name, "", name, found.value, found.error, "", ""
    for cell in result.cells():
        for side, part in {**cell.sides(), "speedup": cell.speedup}.items():
            for name, value in ({} if part is None else vars(part)).items():
                if isinstance(value, Spread):
                    yield "speed", cell.name, side, name, value.median, "", value.low, value.high
                else:
                    yield "speed", cell.name, side, name, value, "", "", ""
                if isinstance(value, TailSpread):
                    yield "speed", cell.name, side, f"{name}_p90", value.p90, "", "", ""
    for way, read in ({} if result.stream is None else result.stream.ways).items():
        for name in ("perplexity", "scored", "ratio", "worst", "bytes", "tokens_s"):
            yield "stream", way, "", name, getattr(read, name), "", "", ""
    if result.training is not None:
        yield from _training_rows(result.training)


def _training_rows(part: Training) -> Iterator[tuple]:
    for side, trained in part.sides().items():
        for step, (loss, norm) in enumerate(zip(trained.losses, trained.norms), start=1):
            yield "training", f"step {step}", side, "loss", loss, "", "", ""
            yield "training", f"step {step}", side, "norm", norm, "", "", ""
        for name in ("ppl_before", "ppl_after", "first_step_ms", "peak_mib"):
            yield "training", "", side, name, getattr(trained, name), "", "", ""
        yield "training", "", side, "step_ms", trained.step_ms.median, "", trained.step_ms.low, trained.step_ms.high
    yield "training", "", "speedup", "step", part.speedup.median, "", part.speedup.low, part.speedup.high
    for group in part.groups:
        for name in ("norm", "error_before", "error_after", "norm_difference"):
            yield "training", group.name, "", name, getattr(group, name), "", "", ""


FILES: dict[str, Callable[[Report], str]] = {
    "report.json": to_json,
    "report.md": to_markdown,
    "report.csv": to_csv,
    "report.html": html.to_html,
}


def files_of(report: Report) -> dict[str, Callable[[Report], str]]:
    """What writes each file of a report."""
    streams = any(result.stream is not None for result in report.results)
    return {**FILES, "stream.svg": plots.perplexity_along_stream} if streams else FILES


def write(report: Report, folder: Path) -> None:
    """Write the report in all formats, each file whole or not at all."""
    texts = {name: make(report) for name, make in files_of(report).items()}
    for name, text in texts.items():
        put(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
