"""The plots of the HTML page, each an SVG element with its table.

matplotlib draws in stand-in colours that become the page's CSS variables, so that plots follow the reader's light or
dark theme.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from . import tables
from .parity_results import Comparison
from .results import ModelResult, Report
from .tables import TextTable
from .training_results import Training

# Stand-in colours, as matplotlib writes them, and the CSS variables they become.
FOREGROUND, GRID, ORIGINAL, PATCHED, THIRD = "#010203", "#010204", "#010205", "#010206", "#010207"
_VARIABLES = {
    FOREGROUND: "var(--text)",
    GRID: "var(--line)",
    ORIGINAL: "var(--original)",
    PATCHED: "var(--patched)",
    THIRD: "var(--third)",
}
# What they become in a file that stands alone.
_COLOURS = {FOREGROUND: "#222222", GRID: "#b0b0b0", ORIGINAL: "#e69f00", PATCHED: "#0072b2", THIRD: "#d55e00"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": FOREGROUND,
    "axes.labelcolor": FOREGROUND,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FOREGROUND,
    "ytick.color": FOREGROUND,
    "legend.frameon": False,
}
_MODE_COLOURS = (PATCHED, ORIGINAL, THIRD)
_WIDTH = 5.6  # inches; a phone shows it at two thirds


# ---------------------------------------------------------------------------------------------------------------- plots


def _axes(height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(columns, 1, squeeze=False)[:, 0]
    for one in axes:
        one.patch.set_alpha(0)
    return figure, list(axes)


_numbers = itertools.count()


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an SVG element, with ids of its own and the page's colours."""
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    mark = f"plot{next(_numbers)}-"
    text = re.sub(r'\bid="', f'id="{mark}', text)
    text = re.sub(r"url\(#", f"url(#{mark}", text)
    text = re.sub(r'href="#', f'href="#{mark}', text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', rf'<svg role="img" aria-label="{label}" \1', text, count=1)
    return Markup(text)


def _speedup_plot(result: ModelResult) -> tuple[Markup, TextTable]:
    cells = [cell for cell in result.cells() if cell.counts]
    measures, places = (("generate", PATCHED), ("decode", THIRD), ("prefill", ORIGINAL)), ("median", "low", "high")
    figure, (axes,) = _axes(0.9 + 0.75 * len(cells))
    for number, cell in enumerate(cells):
        for place, (name, colour) in enumerate(measures):
            factor = cell.speedups()[name]
            y = number + (place - 1) * 0.26
            axes.barh(y, factor.median, 0.22, color=colour, label=name if number == 0 else None)
            axes.plot((factor.low, factor.high), (y, y), color=FOREGROUND, linewidth=1)
            axes.annotate(
                f"{factor.median:.2f}×",
                (factor.high, y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
    axes.axvline(1, color=FOREGROUND, linewidth=1)
    axes.set_yticks(range(len(cells)), [f"{cell.variant}\nbatch {cell.batch}\nprompt {cell.prompt}" for cell in cells])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.set_xlabel("original time / patched time; line: lowest to highest turn")
    figure.legend(loc="outside upper center", ncols=3)
    rows = [
        (cell.name, *(f"{getattr(cell.speedups()[name], at):.3f}" for name, _ in measures for at in places))
        for cell in cells
    ]
    header = ("", *(f"{name}, {at}" for name, _ in measures for at in places))
    return _svg(figure, "speed-up"), TextTable("Speed-up", header, rows)


def _throughput_plot(result: ModelResult) -> tuple[Markup, TextTable]:
    cells = [cell for cell in result.cells() if cell.failed is None]
    series = sorted({(cell.variant, cell.batch) for cell in cells})
    styles = dict(zip(series, itertools.cycle(("-", "--", ":", "-."))))
    figure, panels = _axes(5.0, 2)
    sides = (("original", ORIGINAL), ("patched", PATCHED))
    measures = (("prefill_tokens_s", "prefill, tokens/s"), ("decode_tokens_s", "decode, tokens/s"))
    for axes, (measure, label) in zip(panels, measures):
        for variant, batch in series:
            mine = sorted(
                (cell for cell in cells if (cell.variant, cell.batch) == (variant, batch)),
                key=lambda cell: cell.prompt,
            )
            for side, colour in sides:
                line = [(cell.prompt, getattr(cell.sides()[side], measure).median) for cell in mine]
                name = f"{side}, {variant}, batch {batch}"
                axes.plot(*zip(*line), styles[variant, batch], color=colour, marker="o", markersize=4, label=name)
        prompts = sorted({cell.prompt for cell in cells})
        axes.set_xscale("log", base=2)
        axes.set_xticks(prompts, [str(prompt) for prompt in prompts])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
    panels[-1].set_xlabel("prompt, tokens")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9)
    columns = [(measure, side) for measure, _ in measures for side, _ in sides]
    rows = [
        (cell.name, *(tables.number(getattr(cell.sides()[side], measure).median) for measure, side in columns))
        for cell in cells
    ]
    header = ("", *(f"{measure}, {side}" for measure, side in columns))
    return _svg(figure, "tokens per second against prompt length"), TextTable("Tokens per second", header, rows)


def _deciding(result: ModelResult) -> list[Comparison]:
    return [] if result.parity is None else [row for row in result.parity.deciding() if "against" not in row.name]


def _histogram_plot(result: ModelResult) -> tuple[Markup, TextTable]:
    comparisons = _deciding(result)
    assert result.parity is not None
    figure, (axes,) = _axes(3.2)
    edges = comparisons[0].kl_histogram.edges
    width = 0.8 / len(comparisons)
    for number, (row, colour) in enumerate(zip(comparisons, itertools.cycle(_MODE_COLOURS))):
        counts = row.kl_histogram.counts
        shares = [100 * count / max(1, row.statistics.tokens) for count in counts]
        axes.bar(
            [i + 0.5 + (number - (len(comparisons) - 1) / 2) * width for i in range(len(counts))],
            shares,
            width,
            color=colour,
            label=row.name,
        )
    bound = math.log10(max(result.parity.tolerance["kl_mean"], edges[0]) / edges[0])  # edges are powers of ten
    axes.axvline(bound, color=FOREGROUND, linewidth=1, linestyle="--", label="bound of the mean")
    filled = [i for row in comparisons for i, count in enumerate(row.kl_histogram.counts) if count] or [0]
    axes.set_xlim(min(filled) - 0.5, max(*filled, bound) + 1.5)
    axes.set_xticks(range(0, len(edges), 2), [f"{edge:.0e}" for edge in edges[::2]], rotation=45)
    axes.set_xlabel("KL divergence of patched from original at a token, nats")
    axes.set_ylabel("tokens, %")
    figure.legend(loc="outside upper center", ncols=4)
    columns = [row.kl_histogram.counts for row in comparisons]
    rows = [
        (f"{'under' if i == 0 else f'{edges[i]:.0e} to'} {edges[i + 1]:.0e}", *(f"{column[i]:,}" for column in columns))
        for i in range(len(edges) - 1)
    ]
    header = ("KL divergence, nats", *(f"tokens, {row.name}" for row in comparisons))
    return _svg(figure, "histogram of KL divergences"), TextTable("KL divergence", header, rows)


def _trace_plot(result: ModelResult) -> tuple[Markup, TextTable]:
    comparisons = _deciding(result)
    traces = [row.trace for row in comparisons]
    figure, (axes,) = _axes(3.0)
    for row, colour in zip(comparisons, itertools.cycle(_MODE_COLOURS)):
        axes.plot(row.trace.scored, row.trace.mean, color=colour, linewidth=1, label=row.name)
    axes.axhline(0, color=FOREGROUND, linewidth=0.5)
    axes.set_xlabel("scored tokens, in the text's order")
    axes.set_ylabel("log q - log p, mean")
    figure.legend(loc="outside upper center", ncols=3)
    places = list(zip(traces[0].scored, traces[0].token))
    rows = [
        (
            f"{scored:,}",
            f"{token:,}",
            *(f"{getattr(trace, what)[i]:.2e}" for trace in traces for what in ("mean", "largest")),
        )
        for i, (scored, token) in enumerate(places)
    ]
    columns = [f"{row.name}, {what}" for row in comparisons for what in ("mean", "largest")]
    header = ("scored before", "token of the text", *columns)
    return _svg(figure, "difference of log-probabilities along the text"), TextTable("Along the text", header, rows)


def _draw_stream(panels: list[Axes], results: list[ModelResult]) -> None:
    """Perplexity along the stream, every way of reading a line, every model a panel."""
    colours = {"fresh": FOREGROUND, "sinks": PATCHED, "window": ORIGINAL, "dense": THIRD}
    for axes, result in zip(panels, results):
        assert result.stream is not None
        fresh = result.stream.ways["fresh"].stretches
        for name, colour in colours.items():
            way = [
                math.nan if value is None or base is None else value / base
                for value, base in zip(result.stream.ways[name].stretches, fresh)
            ]
            line = "--" if name == "window" else "-"  # for it may lie on that of the sinks
            axes.plot(result.stream.ends, way, line, color=colour, linewidth=1.2, label=name)
        axes.axhspan(0.95, 1.05, color=PATCHED, alpha=0.1, linewidth=0)
        axes.set_ylabel("perplexity / fresh")
    panels[-1].set_xlabel("tokens read; the band is 5 % around the perplexity at the training length")


def _stream_plot(result: ModelResult) -> tuple[Markup, TextTable]:
    assert result.stream is not None
    figure, panels = _axes(3.0)
    _draw_stream(panels, [result])
    figure.legend(loc="outside upper center", ncols=4)
    ways = {name: way.stretches for name, way in result.stream.ways.items() if None not in way.stretches}
    rows = [
        (f"{end:,}", *(tables.number(stretches[i]) for stretches in ways.values()))
        for i, end in enumerate(result.stream.ends)
    ]
    table = TextTable("Along the stream", ("tokens read", *ways), rows)
    return _svg(figure, "perplexity along the stream"), table


def _losses_plot(part: Training) -> tuple[Markup, TextTable]:
    """Losses of both sides, and below them how far they are apart."""
    figure, (losses, apart) = _axes(4.6, 2)
    steps = range(1, part.steps + 1)
    losses.plot(steps, part.original.losses, color=ORIGINAL, linewidth=2.5, label="original")
    losses.plot(steps, part.patched.losses, "--", color=PATCHED, linewidth=1.5, label="patched")
    losses.set_ylabel("loss, nats a token")
    apart.plot(steps, part.loss_differences(), color=PATCHED, linewidth=1)
    apart.axhline(part.tolerance["loss"], color=FOREGROUND, linewidth=1, linestyle="--", label="bound of the median")
    if any(part.loss_differences()):
        apart.set_yscale("log")
    apart.set_ylabel("relative difference")
    apart.set_xlabel("step")
    handles = [handle for axes in (losses, apart) for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return _svg(figure, "losses of the two trainings"), tables.losses_table(part)


def plots(result: ModelResult) -> list[dict[str, Any]]:
    """The plots of a model: title, a sentence, the SVG and its table."""
    found = []

    def add(title: str, text: str, plot: tuple[Markup, TextTable]) -> None:
        found.append({"title": title, "text": text, "svg": plot[0], "table": plot[1]})

    with matplotlib.rc_context(_STYLE):
        if any(cell.counts for cell in result.cells()):
            add("Speed-up", "The same tokens from the same weights, in turns.", _speedup_plot(result))
        if any(cell.failed is None for cell in result.cells()):
            add("Tokens per second", "Medians, against prompt length and batch size.", _throughput_plot(result))
        if _deciding(result):
            add("How far apart are the distributions?", "KL divergence of every scored token.", _histogram_plot(result))
            add("Along the text", "Log-probability of the true token, patched less original.", _trace_plot(result))
        if result.stream is not None:
            add("Along the stream", "Perplexity of each stretch, to that of windows.", _stream_plot(result))
        if result.training is not None:
            add("Losses", "The same batches and optimizer, from the same weights.", _losses_plot(result.training))
    return found


def perplexity_along_stream(report: Report) -> str:
    """An SVG file of the streams of a report's models, in colours of its own."""
    results = [result for result in report.results if result.stream is not None]
    with matplotlib.rc_context(_STYLE):
        figure, panels = _axes(0.6 + 2.6 * len(results), len(results))
        _draw_stream(panels, results)
        for axes, result in zip(panels, results):
            axes.set_title(result.model, fontsize=10, loc="left")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    for stand_in, colour in _COLOURS.items():
        text = text.replace(stand_in, colour)
    return text
