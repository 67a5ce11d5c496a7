"""The main job: is the patched model still the same model, and how much faster does it generate?"""

from __future__ import annotations

import datetime
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import __version__, registry
from ..errors import UserError
from ..patches import layer_kernels, patched, unpatched
from . import machine, models, perplexity, speed

SCHEMA = 1
# Largest |ratio - 1| of the two perplexities. In fp32 both models compute the same sums in another order (1e-7 relative
# a layer); in 16 bits the roundings between the steps differ, 2^-9 relative in bf16, and average out over the tokens.
TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-3}


@dataclass(frozen=True)
class Options:
    """What to run. `models` are names or paths; the embedded ones when empty."""

    models: tuple[str, ...] = ()
    text: str | None = None
    device: str | None = None
    dtype: str | None = None
    backend: str = "auto"
    context: int = 512
    windows: int = 16
    prompt: int = 256
    new_tokens: int = 64
    rounds: int = 9


def _both(run: Callable[[], Any], backend: str) -> dict[str, Any]:
    """Run on the original and on the patched model."""
    with unpatched():
        original = run()
    with patched(backend=backend, strict=True):
        return {"original": original, "patched": run()}


def _parity(runs: dict[str, torch.Tensor], tolerance: float) -> dict[str, Any]:
    values = {name: perplexity.perplexity(scores) for name, scores in runs.items()}
    ratio = values["patched"] / values["original"] if values["original"] else math.nan
    return {**values, "ratio": ratio, "passed": bool(abs(ratio - 1) <= tolerance)}  # NaN fails


def evaluate(name: str, options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Evaluate one model: its part of the report. Raises UserError for what cannot be used."""
    device = models.pick_device(options.device)
    dtype = models.pick_dtype(options.dtype, name, device)
    text = models.read_text(options.text)
    loaded = models.load(name, device, dtype)
    ids = models.windows(loaded.tokenizer, text, options.context, options.windows)
    with patched(backend=options.backend, strict=True):
        kernels = layer_kernels(loaded.model)  # a backend that cannot serve says so before anything is computed
    dtype_name = str(dtype).removeprefix("torch.")

    def bar(label: str, total: int) -> Callable[[int], None]:
        if progress is None:
            return lambda done: None
        task = progress.add_task(f"{loaded.name}: {label}", total=total)
        return lambda done: progress.advance(task, done)

    tolerance = TOLERANCE[dtype_name]
    step = bar("perplexity, one pass", 2 * ids.numel())
    prefill = _both(lambda: perplexity.one_pass(loaded.model, ids, step=step), options.backend)
    step = bar("perplexity, token by token", 2 * (ids.numel() - len(ids)))
    decode = _both(lambda: perplexity.token_by_token(loaded.model, ids, step=step), options.backend)

    prompt = ids[:1, : options.prompt].to(device)
    step = bar("generate", 2 * (options.rounds + 1))

    def run(context: Callable[[], Any]) -> tuple[torch.Tensor, float]:
        with context():
            return speed.generate(loaded.model, prompt, options.new_tokens)

    speeds, same = speed.in_turns(
        {
            "original": lambda: run(unpatched),
            "patched": lambda: run(lambda: patched(backend=options.backend, strict=True)),
        },
        options.rounds,
        lambda: step(1),
    )
    result = {
        "model": loaded.name,
        "model_type": loaded.model.config.model_type,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "dtype": dtype_name,
        "attention": loaded.model.config._attn_implementation,
        "baseline": machine.baseline(loaded.model.config.model_type),
        "kernels": kernels,
        "text": {"source": text.source, "windows": len(ids), "tokens_each": ids.shape[1]},
        "tolerance": tolerance,
        "perplexity": {"one_pass": _parity(prefill, tolerance), "token_by_token": _parity(decode, tolerance)},
        "generate": {
            "prompt_tokens": prompt.shape[1],
            "new_tokens": options.new_tokens,
            "rounds": options.rounds,
            **{name: asdict(value) for name, value in speeds.items()},
            "speedup": speeds["patched"].median / speeds["original"].median,
            "same_tokens": same,
        },
    }
    result["passed"] = all(mode["passed"] for mode in result["perplexity"].values())
    return result


def build(options: Options, console: Console, command: str) -> dict[str, Any]:
    """Run the whole report, with progress on `console`."""
    try:
        registry.check_backend(options.backend)
    except ValueError as error:
        raise UserError(str(error)) from error
    names = list(options.models) or models.embedded()
    if not names:
        raise UserError(f"the embedded models are missing from {models.ASSETS}; name one with --model")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        results = [evaluate(name, options, progress) for name in names]
    return {
        "schema": SCHEMA,
        "hf_gdn": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine.machine(models.pick_device(options.device)),
        "versions": machine.versions(),
        "results": results,
        "passed": all(result["passed"] for result in results),
    }


# -------------------------------------------------------------------------------------------------------------- output

_HEADER = ("model", "measure", "original", "patched", "ratio", "verdict")


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The report's table, a row per model and measure."""
    table: list[tuple[str, ...]] = []
    for result in report["results"]:
        for mode, label in (("one_pass", "perplexity, one pass"), ("token_by_token", "perplexity, token by token")):
            values = result["perplexity"][mode]
            verdict = "same" if values["passed"] else f"NOT THE SAME (more than {result['tolerance']:g} off)"
            table.append(
                (result["model"], label, f"{values['original']:.4f}", f"{values['patched']:.4f}",
                 f"{values['ratio']:.7f}", verdict)
            )  # fmt: skip
        made = result["generate"]
        tokens = "same tokens" if made["same_tokens"] else "other tokens"
        medians = (f"{made[name]['median']:.1f}" for name in ("original", "patched"))
        table.append((result["model"], "generate, tokens/s", *medians, f"{made['speedup']:.2f}x", tokens))
    return table


def _conditions(report: dict[str, Any]) -> list[str]:
    """What the table was measured on, a line each."""
    where, lines = report["machine"], []
    device = where.get("gpu", where["processor"])
    lines.append(f"machine: {device} ({where['device']}, {where['threads']} threads)")
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    for result in report["results"]:
        text, made = result["text"], result["generate"]
        functions = ", ".join(f"{name}: {where}" for name, where in result["baseline"].items())
        kernels = "; ".join(sorted(set(result["kernels"].values())))
        lines.append(
            f"{result['model']}: {result['parameters']:,} parameters, {result['dtype']}, "
            f"attention {result['attention']}; {text['windows']} windows of {text['tokens_each']} tokens, "
            f"{text['source']}; generate: {made['prompt_tokens']} + {made['new_tokens']} tokens, batch 1, "
            f"median of {made['rounds']}, in turns"
        )
        lines.append(f"{result['model']}: original ran on {functions}; patched on {kernels}")
    return lines


def verdict(report: dict[str, Any]) -> str:
    """One sentence."""
    speedups = ", ".join(f"{result['generate']['speedup']:.2f}x" for result in report["results"])
    if report["passed"]:
        return f"PASSED: perplexity is the original's; generation speed {speedups}"
    bad = ", ".join(result["model"] for result in report["results"] if not result["passed"])
    return f"FAILED: perplexity is not the original's: {bad}"


def to_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# hf_gdn report, {report['date']}", "", f"**{verdict(report)}**", ""]
    lines.append("| " + " | ".join(_HEADER) + " |")
    lines.append("|" + "---|" * len(_HEADER))
    lines += ["| " + " | ".join(row) + " |" for row in rows(report)]
    lines += ["", *(f"- {line}" for line in _conditions(report)), f"- command: `{report['command']}`", ""]
    return "\n".join(lines)


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report."""
    table = Table(title="hf_gdn report")
    for name in _HEADER:
        table.add_column(name, no_wrap=True)
    for row in rows(report):
        table.add_row(*row)
    console.print(table)
    for line in _conditions(report):
        console.print(line, style="dim", highlight=False)
    console.print(verdict(report), style="bold green" if report["passed"] else "bold red")


def prepare(output: str) -> Path:
    """Make the output folder and see that it can be written, before hours of work."""
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {output!r} cannot be written: {error.strerror}") from error
    return folder


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write report.json and report.md, each whole or not at all."""
    strict = json.loads(json.dumps(report), parse_constant=lambda name: None)  # NaN is no JSON
    texts = {"report.json": json.dumps(strict, indent=2) + "\n", "report.md": to_markdown(report)}
    paths = []
    for name, text in texts.items():
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        paths.append(partial.replace(folder / name))
    return paths


def main(options: Options, output: str) -> bool:
    """Run, show and write the report. Returns whether parity held."""
    folder = prepare(output)
    report = build(options, Console(stderr=True), " ".join(["hf-gdn", *sys.argv[1:]]))
    console = machine.console()
    show(report, console)
    for path in write(report, folder):
        console.print(f"wrote {path}", highlight=False)
    return bool(report["passed"])
