"""A report in words: its verdict, what is wrong, and what the figures were measured on and with."""

from __future__ import annotations

from collections.abc import Iterator

from .results import ModelResult, Report
from .tables import GRADES, TRAINING_GRADES, number, tokens
from .training_results import Training

# ------------------------------------------------------------------------------------------------------------- verdict


def speedups(result: ModelResult) -> list[float]:
    """Median speed-ups of `generate` in the cells of a result that count; those over plain decoding, by drafts, only
    where there are no others."""
    cells = [cell for cell in result.cells() if cell.counts and cell.speedup is not None]
    cells = [cell for cell in cells if cell.drafts is None] or cells
    return [cell.speedup.generate.median for cell in cells if cell.speedup is not None]


def verdict(report: Report) -> str:
    """One sentence."""
    if not report.passed:
        missing = any(result.not_patched is not None for result in report.results)
        return ("NOT PATCHED: " if missing else "FAILED: ") + "; ".join(complaints(report))
    said = []
    if report.kernels is not None:
        right = sum(row.passed is True for row in report.kernels)
        said.append(f"{right} results of {len(report.kernels)} within their dtype's error of the float64 oracle")
    if report.layers is not None:
        judged = [row.passed for row in report.layers if row.passed is not None]
        said.append(f"{sum(judged)} patched layers of {len(judged)} within their dtype's error of the original")
    return "PASSED: " + "; ".join([*said, *(_praise(result) for result in report.results)])


def _praise(result: ModelResult) -> str:
    words = ["is the same model"] if result.parity is not None else []
    factors = [f"{factor:.2f}" for factor in speedups(result)]
    if factors:
        low, high = min(factors, key=float), max(factors, key=float)
        words.append(f"generates {low} to {high} times as fast" if low != high else f"generates {low} times as fast")
    if result.stream is not None:
        ratio = result.stream.ways["sinks"].ratio
        words.append(
            f"reads {result.stream.tokens:,} tokens with attention sinks at {ratio:.3f} times the perplexity of its "
            "training length"
        )
    if result.training is not None:
        factor = result.training.speedup.median
        words.append(f"trains the same, {factor:.2f} times as fast")
    return f"{result.model} {' and '.join(words)}".rstrip()


def complaints(report: Report) -> Iterator[str]:
    """What is wrong, a sentence each."""
    for result in report.results:
        if result.not_patched is not None:
            yield f"{result.model} runs as the original, nothing was compared ({result.not_patched})"
        for row in result.comparisons():
            if row.decides and row.grade != "same":
                bad = row.first_bad
                where = f", first at token {bad.text_token} ({bad.run}, window {bad.window})" if bad else ""
                yield f"{result.model}, {row.name}: {GRADES[row.grade]} ({row.why}{where})"
        for cell in result.cells():
            if not cell.counts:
                yield f"{result.model}, {cell.name}: {cell.failed or tokens(cell)}"
        if result.stream is not None and not result.stream.passed:
            yield f"{result.model}: the perplexity with attention sinks is not finite"
        if result.training is not None and not result.training.passed:
            yield f"{result.model}: {TRAINING_GRADES[result.training.grade]} ({result.training.why})"
    for timed in report.timed():
        if timed.passed is False:
            yield f"{timed.name}: {timed.note}"


# ---------------------------------------------------------------------------------------------------------- conditions


def conditions(report: Report) -> list[tuple[str, str]]:
    """What the figures were measured on and with."""
    lines = [
        ("machine", _pairs(report.machine)),
        ("processes", str(report.processes)),
        ("versions", _pairs(report.versions)),
        ("date", report.date),
        ("command", report.command),
    ]
    if report.ceilings is not None:
        limits = ", ".join(f"{name} {number(value)}" for name, value in vars(report.ceilings).items())
        lines.append(("100 % is", f"{limits}, measured in this run"))
    if report.left_out is not None:
        lines.append(("left out", "; ".join(report.left_out) or "nothing"))
    for result in report.results:
        lines.append((result.model, _about(result)))
        functions = ", ".join(f"{name}: {place}" for name, place in result.baseline.items())
        lines.append((f"{result.model}, original", functions))
        lines.append((f"{result.model}, patched", _kernels(result.kernels)))
        if result.parity is not None:
            part = result.parity
            bounds = ", ".join(f"{name} {value:g}" for name, value in part.tolerance.items())
            windows = f"{part.windows} windows of {part.context} tokens, {part.scored:,} tokens scored"
            text = f"{part.text} ({part.text_tokens:,} tokens): {windows}; bounds: {bounds}"
            lines.append((f"{result.model}, text", text))
        if result.stream is not None:
            kept = f"{result.stream.context} tokens kept, {result.stream.sinks} of them sinks"
            lines.append((f"{result.model}, stream", f"{result.stream.text}: {result.stream.tokens:,} tokens, {kept}"))
        if result.training is not None:
            lines.append((f"{result.model}, training", _trained(result.training)))
    return lines


def _trained(part: Training) -> str:
    words = [
        f"{part.text} ({part.text_tokens:,} tokens): {part.steps} steps of {part.batch} × {part.context} tokens",
        f"AdamW with learning rate {part.lr:g}",
        f"{part.trained:,} parameters trained" + ("" if part.lora is None else f", LoRA of rank {part.lora}"),
        *(["documents packed for the patched model, padded for the original"] if part.packed else []),
        *(["gradient checkpointing"] if part.checkpointing else []),
        f"seed {part.seed}",
        "bounds: " + ", ".join(f"{name} {value:g}" for name, value in part.tolerance.items()),
    ]
    return "; ".join(words)


def _pairs(found: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _about(result: ModelResult) -> str:
    words = [
        result.model_type,
        f"{result.parameters:,} parameters" + (" at random" if result.random_weights else ""),
        f"{result.dtype}, {result.quantize} weights" if result.quantize else result.dtype,
        f"attention {result.attention}",
    ]
    words += [f"revision {result.revision}"] if result.revision else []
    words += [f"set {', '.join(result.settings)}"] if result.settings else []
    words += ["tensor parallel"] if result.tensor_parallel else []
    return ", ".join(words)


def _kernels(layers: dict[str, str]) -> str:
    """Kernels by layer, layers that agree together."""
    groups: dict[str, list[str]] = {}
    for layer, kernel in layers.items():
        groups.setdefault(kernel, []).append(layer)
    return "; ".join(f"{kernel} ({len(names)} layers: {names[0]} … {names[-1]})" for kernel, names in groups.items())
