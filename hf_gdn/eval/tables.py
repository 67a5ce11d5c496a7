"""The tables of a report, as strings: for terminals, Markdown and the HTML page alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

GRADES = {
    "same": "same model",
    "close": "CLOSE, not the same",
    "different": "DIFFERENT",
    "not finite": "NOT FINITE",
}


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


def with_error(statistic: dict[str, float | None], digits: int = 5) -> str:
    """``value ± standard error``."""
    value, error = statistic["value"], statistic["error"]
    return number(value, digits) if error is None else f"{number(value, digits)} ± {number(error, 2)}"


def cell_name(cell: dict[str, Any]) -> str:
    """A speed cell in short: variant, batch and prompt."""
    return f"{cell['variant']}, {cell['batch']} × {cell['prompt']}"


def tokens(cell: dict[str, Any]) -> str:
    """What became of a cell's tokens, in words."""
    found = cell["tokens"]
    if found["verdict"] == "same":
        return "same tokens"
    kind = "a tie" if found["verdict"] == "tie" else "OTHER TOKENS, does not count"
    return f"{kind} from token {found['token']} (logits {number(found['gap'], 2)} apart)"


# -------------------------------------------------------------------------------------------------------------- tables


def of_report(report: dict[str, Any]) -> list[TextTable]:
    """The report's tables."""
    found = []
    for result in report["results"]:
        if "parity" in result:
            found.append(_parity_sheet(result))
        if "speed" in result:
            found.append(_speed_sheet(result))
    if "kernels" in report:
        found += _kernel_sheets(report)
    return found


def _parity_sheet(result: dict[str, Any]) -> TextTable:
    header = ("tokens compared", "PPL original", "PPL patched", "ratio", "KL mean", "KL 99 %", "same top %", "verdict")
    rows: list[tuple[str, ...]] = []
    for row in result["parity"]["comparisons"]:
        found = row["statistics"]
        rows.append(
            (
                row["name"],
                with_error(found["ppl_original"]),
                with_error(found["ppl_patched"]),
                f"{found['ppl_ratio']['value']:.7f} ± {number(found['ppl_ratio']['error'], 1)}",
                with_error(found["kl_mean"], 4),
                number(found["kl_99"]["value"], 4),
                with_error(found["same_top"]),
                GRADES[row["grade"]] if row["decides"] else f"({row['grade']})",
            )
        )
    return TextTable(f"{result['model']}: is it the same model?", header, rows)


def statistics_sheet(result: dict[str, Any]) -> TextTable:
    """All statistics of a result's comparisons, a column a comparison."""
    comparisons = result["parity"]["comparisons"]
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
        (label, *(with_error(row["statistics"][name], digits.get(name, 5)) for row in comparisons))
        for name, label in names.items()
    ]
    rows.append(("tokens", *(f"{row['statistics']['tokens']:,}" for row in comparisons)))
    return TextTable(f"{result['model']}: all statistics", ("", *(row["name"] for row in comparisons)), rows)


def _speed_sheet(result: dict[str, Any]) -> TextTable:
    header = (
        "run",
        "first token, ms",
        "per token, ms",
        "p90, ms",
        "tokens/s",
        "prefill",
        "decode",
        "generate",
        "peak MiB",
        "first call, s",
        "tokens",
    )
    rows: list[tuple[str, ...]] = []
    for cell in result["speed"]["cells"]:
        if "failed" in cell:
            rows.append((cell_name(cell), cell["failed"], *[""] * 9))
            continue
        a, b = cell["original"], cell["patched"]
        factors = [cell["speedup"][name] for name in ("prefill", "decode", "generate")]
        rows.append(
            (
                cell_name(cell),
                _change(a["ttft_ms"]["median"], b["ttft_ms"]["median"]),
                _change(a["tpot_ms"]["median"], b["tpot_ms"]["median"]),
                _change(a["tpot_ms"]["p90"], b["tpot_ms"]["p90"]),
                _change(a["generate_tokens_s"]["median"], b["generate_tokens_s"]["median"]),
                *(_factor(factor) if cell["counts"] else "–" for factor in factors),
                _change(a["peak_mib"], b["peak_mib"]),
                _change(a["first_call_s"], b["first_call_s"]),
                tokens(cell) + ("" if cell["repeatable"] else "; not the same in every turn"),
            )
        )
    return TextTable(f"{result['model']}: how fast is it? (original → patched; batch × prompt)", header, rows)


def _factor(value: dict[str, float]) -> str:
    """Median, lowest and highest."""
    return f"{value['median']:.2f}× ({value['low']:.2f}–{value['high']:.2f})"


def spread_sheet(result: dict[str, Any]) -> TextTable:
    """Median, lowest and highest of what was timed in turns."""
    measures = ("ttft_ms", "tpot_ms", "prefill_tokens_s", "decode_tokens_s", "generate_tokens_s")
    rows = [
        (cell_name(cell), side, *(_spread(cell[side][name]) for name in measures))
        for cell in result["speed"]["cells"]
        for side in ("original", "patched")
        if "failed" not in cell
    ]
    return TextTable(f"{result['model']}: spread (median, lowest to highest)", ("run", "", *measures), rows)


def _spread(value: dict[str, float]) -> str:
    return f"{number(value['median'], 3)} ({number(value['low'], 3)} – {number(value['high'], 3)})"


def _change(before: float | None, after: float | None) -> str:
    return f"{number(before, 3)} → {number(after, 3)}" if before is not None and after is not None else "not measured"


def kernel_name(row: dict[str, Any]) -> str:
    """A row of the kernels in short."""
    backward = " + backward" if row["direction"] == "backward" else ""
    return f"{row['op']}{backward}, {row['shape']}, {row['batch']} × {row['tokens']}, {row['backend']}"


def _kernel_sheets(report: dict[str, Any]) -> list[TextTable]:
    """A table for every op, shape and direction."""
    header = ("B × T", "backend", "ms", "TFLOP/s", "GB/s", "speed-up", "extra MiB", "first call, ms", "error")
    tables: dict[str, list[tuple[str, ...]]] = {}
    for row in report["kernels"]:
        backward = " forward + backward" if row["direction"] == "backward" else ""
        how = ", CUDA graph" if row["gpu_graph"] else ""
        title = f"{row['op']}{backward}, {row['shape']}, {row['dtype']}{how}"
        tables.setdefault(title, []).append(_kernel_cells(row))
    return [TextTable(title, header, rows) for title, rows in tables.items()]


def _kernel_cells(row: dict[str, Any]) -> tuple[str, ...]:
    name = (f"{row['batch']} × {row['tokens']}", row["backend"])
    error = "" if row["worst"] is None else "inf" if row["error"] is None else f"{row['error']:.1e}"
    if row["ms"] is None:
        return (*name, row["note"], *[""] * 5, error)
    return (
        *name,
        f"{number(row['ms'], 3)} ± {(row['high'] - row['low']) / 2 / row['ms']:.0%}",
        f"{number(row['tflop_s'], 3)} ({row['share_compute']:.0%})",
        f"{number(row['gb_s'], 3)} ({row['share_bandwidth']:.0%})",
        "" if row["speedup"] is None else f"{row['speedup']:.2f}×",
        number(row["extra_mib"], 3),
        number(row["first_ms"], 3),
        error,
    )
