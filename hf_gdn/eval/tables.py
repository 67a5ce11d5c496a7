"""The tables of a report, as strings: for terminals, Markdown and the HTML page alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .parity_results import Estimate
from .results import STREAM_WAYS, ModelResult, Report, SpeedCell, Stream
from .spreads import Spread
from .training_results import Trained, Training

GRADES = {
    "same": "same model",
    "close": "CLOSE, not the same",
    "different": "DIFFERENT",
    "not finite": "NOT FINITE",
}


TRAINING_GRADES = {grade: text.replace("model", "training") for grade, text in GRADES.items()}


@dataclass(frozen=True)
class TextTable:
    """A table of strings."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


# ------------------------------------------------------------------------------------------------------------- wording


def number(value: float | None, digits: int = 4) -> str:
    """A figure with so many significant digits; "not measured" for None."""
    if value is None:
        return "not measured"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        places = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
        return f"{value:,.{places}f}"
    return f"{value:.{max(0, digits - 3)}e}"


def with_error(statistic: Estimate, digits: int = 5) -> str:
    """``value ± standard error``."""
    value, error = statistic.value, statistic.error
    return number(value, digits) if error is None else f"{number(value, digits)} ± {number(error, 2)}"


def tokens(cell: SpeedCell) -> str:
    """What became of a cell's tokens, in words."""
    found = cell.tokens
    if found is None or found.verdict == "same":
        return "same tokens" + _drafts(cell)
    kind = "a tie" if found.verdict == "tie" else "OTHER TOKENS, does not count"
    return f"{kind} from token {found.token} (logits {number(found.gap, 2)} apart)"


def _drafts(cell: SpeedCell) -> str:
    made = cell.drafts
    if made is None:
        return ""
    each = f", {made.accepted / made.count:.1f} a draft" if made.count else ""
    return f"; {made.accepted} of {made.drafted} drafted accepted{each}"


# -------------------------------------------------------------------------------------------------------------- tables


def of_report(report: Report) -> list[TextTable]:
    """The report's tables."""
    found = [table for result in report.results for table in of_model(result)]
    return found + _kernel_tables(report) + _layer_tables(report)


def of_model(result: ModelResult) -> list[TextTable]:
    """The tables of a model that are shown first."""
    found = []
    if result.parity is not None:
        found.append(_parity_table(result))
    if result.speed is not None:
        found.append(_speed_table(result))
    if result.stream is not None:
        found.append(_stream_table(result.model, result.stream))
    if result.training is not None:
        found.append(_training_table(result.model, result.training))
    return found


def details(result: ModelResult) -> list[TextTable]:
    """The tables of a model with all figures."""
    found = []
    if result.parity is not None:
        found.append(_statistics_table(result))
    if result.speed is not None:
        found.append(_spread_table(result))
    if result.training is not None:
        found.append(_gradients_table(result.model, result.training))
    found.append(TextTable("Kernels by layer", ("layer", "patched"), list(result.kernels.items())))
    return found


def _parity_table(result: ModelResult) -> TextTable:
    header = ("tokens compared", "PPL original", "PPL patched", "ratio", "KL mean", "KL 99 %", "same top %", "verdict")
    rows: list[tuple[str, ...]] = []
    for row in result.comparisons():
        found = row.statistics
        rows.append(
            (
                row.name,
                with_error(found.ppl_original),
                with_error(found.ppl_patched),
                f"{found.ppl_ratio.value:.7f} ± {number(found.ppl_ratio.error, 1)}",
                with_error(found.kl_mean, 4),
                number(found.kl_99.value, 4),
                with_error(found.same_top),
                GRADES[row.grade] if row.decides else f"({row.grade})",
            )
        )
    return TextTable(f"{result.model}: is it the same model?", header, rows)


def _statistics_table(result: ModelResult) -> TextTable:
    """A column a comparison."""
    comparisons = result.comparisons()
    names = {
        "ppl_original": "perplexity, original",
        "ppl_patched": "perplexity, patched",
        "ppl_ratio": "ratio",
        "correlation": "correlation of log-probabilities",
        "kl_mean": "KL divergence, mean",
        "kl_median": "median",
        "kl_99": "99 %",
        "kl_999": "99.9 %",
        "kl_max": "max",
        "rms_dp": "RMS Δp, %",
        "same_top": "same top token, %",
        "logit_diff": "largest logit difference",
    }
    digits = {"ppl_ratio": 8, "correlation": 8}
    rows = [
        (label, *(with_error(row.statistics.estimates()[name], digits.get(name, 5)) for row in comparisons))
        for name, label in names.items()
    ]
    rows.append(("tokens", *(f"{row.statistics.tokens:,}" for row in comparisons)))
    return TextTable(f"{result.model}: all statistics", ("", *(row.name for row in comparisons)), rows)


def _speed_table(result: ModelResult) -> TextTable:
    columns = ("first token, ms", "per token, ms", "p90, ms", "tokens/s", "prefill", "decode", "generate")
    header = ("run", *columns, "peak MiB", "first call, s", "tokens")
    rows: list[tuple[str, ...]] = []
    for cell in result.cells():
        a, b = cell.original, cell.patched
        if a is None or b is None:
            rows.append((cell.name, cell.failed or "", *[""] * 9))
            continue
        rows.append(
            (
                cell.name,
                _change(a.ttft_ms.median, b.ttft_ms.median),
                _change(a.tpot_ms.median, b.tpot_ms.median),
                _change(a.tpot_ms.p90, b.tpot_ms.p90),
                _change(a.generate_tokens_s.median, b.generate_tokens_s.median),
                *(_factor(factor) if cell.counts else "–" for factor in cell.speedups().values()),
                _change(a.peak_mib, b.peak_mib),
                _change(a.first_call_s, b.first_call_s),
                tokens(cell) + ("" if cell.repeatable else "; not the same in every turn"),
            )
        )
    return TextTable(f"{result.model}: how fast is it? (original → patched; batch × prompt)", header, rows)


def _factor(value: Spread) -> str:
    """Median, lowest and highest."""
    return f"{value.median:.2f}× ({value.low:.2f}–{value.high:.2f})"


def _spread_table(result: ModelResult) -> TextTable:
    measures = ("ttft_ms", "tpot_ms", "prefill_tokens_s", "decode_tokens_s", "generate_tokens_s")
    rows = [
        (cell.name, name, *(_spread(getattr(side, measure)) for measure in measures))
        for cell in result.cells()
        for name, side in cell.sides().items()
    ]
    return TextTable(f"{result.model}: spread (median, lowest to highest)", ("run", "", *measures), rows)


def _spread(value: Spread) -> str:
    return f"{number(value.median, 3)} ({number(value.low, 3)} – {number(value.high, 3)})"


def _change(before: float | None, after: float | None) -> str:
    return f"{number(before, 3)} → {number(after, 3)}" if before is not None and after is not None else "not measured"


def _stream_table(model: str, stream: Stream) -> TextTable:
    columns = ("tokens scored", "perplexity", "to fresh", "worst stretch", "cache, KiB", "tokens/s")
    rows: list[tuple[str, ...]] = []
    for name, way in stream.ways.items():
        rows.append(
            (
                f"{name}: {STREAM_WAYS[name]}",
                f"{way.scored:,}",
                number(way.perplexity),
                f"{way.ratio:.3f}",
                "" if way.worst is None else f"{way.worst:.3f}",
                "" if way.bytes is None else f"{way.bytes / 1024:,.0f}",
                "" if way.tokens_s is None else number(way.tokens_s, 3),
            )
        )
    return TextTable(f"{model}: {stream.tokens:,} tokens of {stream.text}", ("read with", *columns), rows)


def _training_table(model: str, part: Training) -> TextTable:
    header = ("", "first loss", "last loss", "held-out PPL", "step, ms", "first step, ms", "peak MiB", "verdict")

    def cells(side: Trained) -> tuple[str, ...]:
        return (
            number(side.losses[0], 6),
            number(side.losses[-1], 6),
            f"{number(side.ppl_before, 6)} → {number(side.ppl_after, 6)}",
            _spread(side.step_ms),
            number(side.first_step_ms, 3),
            number(side.peak_mib, 3),
        )

    a, b, worst = part.original, part.patched, part.worst_group()
    differences = part.loss_differences()
    apart = (
        f"{number(differences[0], 2)} off",
        f"{number(differences[-1], 2)} off",
        f"ratio {b.ppl_after / a.ppl_after:.7f}",
        _factor(part.speedup),
        "",
        f"{b.peak_mib / a.peak_mib:.2f} of it",
        TRAINING_GRADES[part.grade],
    )
    rows = [("original", *cells(a), ""), ("patched", *cells(b), ""), ("patched to original", *apart)]
    title = (
        f"{model}: does it train the same? Gradients are {number(worst.error_before, 2)} off before and "
        f"{number(worst.error_after, 2)} after {part.steps} steps at most ({worst.name})"
    )
    return TextTable(title, header, rows)


def _gradients_table(model: str, part: Training) -> TextTable:
    header = ("parameters", "number", "norm", "error before", "error after", "largest difference of norms at a step")
    rows: list[tuple[str, ...]] = [
        (
            group.name,
            f"{group.parameters:,}",
            number(group.norm),
            number(group.error_before, 2),
            number(group.error_after, 2),
            number(group.norm_difference, 2),
        )
        for group in part.groups
    ]
    return TextTable(f"{model}: gradients on the same weights, before and after training", header, rows)


def losses_table(part: Training) -> TextTable:
    """Both trainings, a row a step."""
    header = ("step", "loss, original", "loss, patched", "difference", "gradient's norm, original", "patched")
    figures = (part.original.losses, part.patched.losses, part.loss_differences())
    rows: list[tuple[str, ...]] = [
        (str(step), number(a, 7), number(b, 7), number(apart, 2), number(norm_a, 6), number(norm_b, 6))
        for step, (a, b, apart, norm_a, norm_b) in enumerate(
            zip(*figures, part.original.norms, part.patched.norms), start=1
        )
    ]
    return TextTable("Losses", header, rows)


# ------------------------------------------------------------------------------------------------- kernels and layers


def _grouped(rows: list[tuple[str, tuple[str, ...]]], header: tuple[str, ...]) -> list[TextTable]:
    """A table for every title."""
    tables: dict[str, list[tuple[str, ...]]] = {}
    for title, cells in rows:
        tables.setdefault(title, []).append(cells)
    return [TextTable(title, header, cells) for title, cells in tables.items()]


def _with_goals(report: Report) -> bool:
    return any(row.goal_ms is not None for row in report.timed())


def _error(error: float | None, known: bool) -> str:
    return "" if not known else "inf" if error is None else f"{error:.1e}"


def _share(rate: float | None, share: float | None) -> str:
    return "" if rate is None or share is None else f"{number(rate, 3)} ({share:.0%})"


def _kernel_tables(report: Report) -> list[TextTable]:
    """A table for every op, shape and direction."""
    goals = _with_goals(report)
    header = ("B × T", "backend", "ms", "TFLOP/s", "GB/s", "speed-up", "extra MiB", "first call, ms", "error")
    found = []
    for row in report.kernels or []:
        backward = " forward + backward" if row.direction == "backward" else ""
        title = f"{row.op}{backward}, {row.shape}, {row.dtype}{', CUDA graph' if row.gpu_graph else ''}"
        name, error = (f"{row.batch} × {row.tokens}", row.backend), _error(row.error, row.worst is not None)
        if row.ms is None or row.low is None or row.high is None:
            cells: tuple[str, ...] = (*name, row.note or "", *[""] * 5, error)
        else:
            cells = (
                *name,
                f"{number(row.ms, 3)} ± {(row.high - row.low) / 2 / row.ms:.0%}",
                _share(row.tflop_s, row.share_compute),
                _share(row.gb_s, row.share_bandwidth),
                "" if row.speedup is None else f"{row.speedup:.2f}×",
                number(row.extra_mib, 3),
                number(row.first_ms, 3),
                error,
            )
        found.append((title, (*cells, *_goal(row.goal_ms, goals))))
    return _grouped(found, (*header, *(("goal, ms",) if goals else ())))


def _goal(value: float | None, shown: bool) -> tuple[str, ...]:
    return ("" if value is None else number(value, 3),) if shown else ()


def _layer_tables(report: Report) -> list[TextTable]:
    """A table for every shape and phase."""
    goals = _with_goals(report)
    columns = ("ms", "lowest to highest turn", "speed-up", "projections", "beside them, ms", "floor, ms")
    header = ("B × T", "layer", *columns, "first call, ms", "error")
    found = []
    for row in report.layers or []:
        dtype = f"{row.dtype}, {row.quantize} weights" if row.quantize else row.dtype
        title = f"layer of {row.shape}, {row.phase}, {dtype}{', CUDA graph' if row.gpu_graph else ''}"
        name, error = (f"{row.batch} × {row.tokens}", row.side), _error(row.error, row.budget is not None)
        if row.ms is None:
            cells: tuple[str, ...] = (*name, row.note or "", *[""] * 6, error)
        else:
            spread = "" if row.low is None else f"{number(row.low, 3)} – {number(row.high, 3)}"
            cells = (
                *name,
                number(row.ms, 4),
                spread,
                "" if row.speedup is None else f"{row.speedup:.2f}×",
                "" if row.share_projections is None else f"{row.share_projections:.0%}",
                "" if row.beside_ms is None else number(row.beside_ms, 3),
                "" if row.floor_ms is None else number(row.floor_ms, 3),
                "" if row.first_ms is None else number(row.first_ms, 3),
                error,
            )
        found.append((title, (*cells, *_goal(row.goal_ms, goals))))
    return _grouped(found, (*header, *(("goal, ms",) if goals else ())))
