"""A report in words, as Markdown, CSV and JSON; `hf_gdn.eval.html` makes the HTML page."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from typing import Any

from .tables import GRADES, cell_name, kernel_name, number, of_report, tokens

# ------------------------------------------------------------------------------------------------------------- verdict


def speedups(result: dict[str, Any]) -> list[float]:
    """Median speed-ups of `generate` in the cells of a result that count."""
    cells = result.get("speed", {}).get("cells", [])
    return [cell["speedup"]["generate"]["median"] for cell in cells if cell["counts"]]


def verdict(report: dict[str, Any]) -> str:
    """One sentence."""
    if not report["passed"]:
        missing = [result for result in report["results"] if "not_patched" in result]
        return ("NOT PATCHED: " if missing else "FAILED: ") + "; ".join(complaints(report))
    said = []
    if "kernels" in report:
        right = sum(row["passed"] is True for row in report["kernels"])
        said.append(f"{right} results of {len(report['kernels'])} within their dtype's error of the float64 oracle")
    for result in report["results"]:
        words = [result["model"]]
        if "parity" in result:
            words.append("is the same model")
        factors = [f"{factor:.2f}" for factor in speedups(result)]
        if factors:
            low, high = min(factors, key=float), max(factors, key=float)
            words.append(
                f"generates {low} to {high} times as fast" if low != high else f"generates {low} times as fast"
            )
        said.append(" and ".join([" ".join(words[:2]), *words[2:]]))
    return "PASSED: " + "; ".join(said)


def complaints(report: dict[str, Any]) -> Iterator[str]:
    """What is wrong, a sentence each."""
    for result in report["results"]:
        if "not_patched" in result:
            yield f"{result['model']} runs as the original, nothing was compared ({result['not_patched']})"
        for row in result.get("parity", {}).get("comparisons", []):
            if row["decides"] and row["grade"] != "same":
                bad = row["first_bad"]
                where = f", first at token {bad['text_token']} ({bad['run']}, window {bad['window']})" if bad else ""
                yield f"{result['model']}, {row['name']}: {GRADES[row['grade']]} ({row['why']}{where})"
        for cell in result.get("speed", {}).get("cells", []):
            if not cell["counts"]:
                yield f"{result['model']}, {cell_name(cell)}: {cell.get('failed') or tokens(cell)}"
    for row in report.get("kernels", []):
        if row["passed"] is False:
            yield f"{kernel_name(row)}: {row['note']}"


# ------------------------------------------------------------------------------------------------------------- manifest


def conditions(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What the figures were measured on and with."""
    where = report["machine"]
    lines = [
        ("machine", ", ".join(f"{name} {value}" for name, value in where.items())),
        ("processes", str(report["processes"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        ("date", report["date"]),
        ("command", report["command"]),
    ]
    if "ceilings" in report:
        limits = ", ".join(f"{name} {number(value)}" for name, value in report["ceilings"].items())
        lines.append(("100 % is", f"{limits}, measured in this run"))
        lines.append(("left out", "; ".join(report["left_out"]) or "nothing"))
    for result in report["results"]:
        lines.append((result["model"], _about(result)))
        functions = ", ".join(f"{name}: {place}" for name, place in result["baseline"].items())
        lines.append((f"{result['model']}, original", functions))
        lines.append((f"{result['model']}, patched", _kernels(result["kernels"])))
        if "parity" in result:
            part = result["parity"]
            bounds = ", ".join(f"{name} {value:g}" for name, value in part["tolerance"].items())
            windows = f"{part['windows']} windows of {part['context']} tokens, {part['scored']:,} tokens scored"
            text = f"{part['text']} ({part['text_tokens']:,} tokens): {windows}; bounds: {bounds}"
            lines.append((f"{result['model']}, text", text))
    return lines


def _about(result: dict[str, Any]) -> str:
    words = [
        result["model_type"],
        f"{result['parameters']:,} parameters" + (" at random" if result["random_weights"] else ""),
        result["dtype"],
        f"attention {result['attention']}",
    ]
    words += [f"revision {result['revision']}"] if result["revision"] else []
    words += [f"set {', '.join(result['settings'])}"] if result["settings"] else []
    words += ["tensor parallel"] if result["tensor_parallel"] else []
    return ", ".join(words)


def _kernels(layers: dict[str, str]) -> str:
    """Kernels by layer, layers that agree together."""
    groups: dict[str, list[str]] = {}
    for layer, kernel in layers.items():
        groups.setdefault(kernel, []).append(layer)
    return "; ".join(f"{kernel} ({len(names)} layers: {names[0]} … {names[-1]})" for kernel, names in groups.items())


# -------------------------------------------------------------------------------------------------------------- formats


def to_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown, to be pasted into a pull request."""
    lines = [f"# hf_gdn {report['kind']}, {report['date']}", "", f"**{verdict(report)}**", ""]
    for sheet in of_report(report):
        lines += [f"### {sheet.title}", "", "| " + " | ".join(sheet.header) + " |", "|" + "---|" * len(sheet.header)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in sheet.rows] + [""]
    lines += ["<details><summary>Machine, versions, kernels</summary>", ""]
    lines += [f"- {name}: {value}" for name, value in conditions(report)] + ["", "</details>", ""]
    return "\n".join(lines)


CSV_HEADER = ("model", "section", "item", "side", "measure", "value", "error", "low", "high")


def to_csv(report: dict[str, Any]) -> str:
    """Every figure of the report, a row each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for result in report["results"]:
        for row in result.get("parity", {}).get("comparisons", []):
            for name, value in row["statistics"].items():
                found = value if isinstance(value, dict) else {"value": value, "error": None}
                writer.writerow(
                    [result["model"], "parity", row["name"], "", name, found["value"], found["error"], "", ""]
                )
        for cell in result.get("speed", {}).get("cells", []):
            for side in ("original", "patched", "speedup"):
                for name, value in cell.get(side, {}).items():
                    found = value if isinstance(value, dict) else {"median": value}
                    writer.writerow(
                        [
                            result["model"],
                            "speed",
                            cell_name(cell),
                            side,
                            name,
                            found["median"],
                            "",
                            found.get("low", ""),
                            found.get("high", ""),
                        ]
                    )
                    if "p90" in found:
                        writer.writerow(
                            [result["model"], "speed", cell_name(cell), side, f"{name}_p90", found["p90"], *[""] * 3]
                        )
    for row in report.get("kernels", []):
        for name in ("ms", "tflop_s", "gb_s", "share_compute", "share_bandwidth", "speedup", "extra_mib", "first_ms"):
            spread = (row["low"], row["high"]) if name == "ms" else ("", "")
            writer.writerow([row["shape"], "kernels", kernel_name(row), row["backend"], name, row[name], "", *spread])
        writer.writerow([row["shape"], "kernels", kernel_name(row), row["backend"], "error", row["error"], *[""] * 3])
    return text.getvalue()


def to_json(report: dict[str, Any]) -> str:
    """The report as JSON; NaN and infinities, which JSON lacks, as null."""
    return json.dumps(_finite(report), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
