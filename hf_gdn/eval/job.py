"""The main job: is the patched model still the same model, and how much faster does it generate?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from .. import __version__, registry
from ..errors import PatchError, UserError
from ..loading import models, texts
from ..loading.models import Loaded, Source
from ..patches import layer_kernels, patched
from ..upstream import configs
from . import html, kernel_bench, machine, parity, progress, speed, tables, writers
from .distributed import Processes
from .resume import Journal, Work, prepare, put

# Version of the layout of report.json (docs/report.md).
SCHEMA = 2


@dataclass(frozen=True)
class EvalJob:
    """What to run. "report" is parity and speed, "ppl" and "speed" one of them.

    Args:
        kind: ``"report"``, ``"ppl"`` or ``"speed"``.
        sources: the models.
        text: files to be scored; with no data set either, the embedded text.
        text_field: field of .jsonl and .parquet files and of the data set.
        dataset, split: a data set of the `datasets` library.
        device, dtype, backend: None for the defaults.
        context, stride, windows: tokens a window, tokens between two, how many (0: all).
        ppl, speed: how they run.
        output: folder.
        resume: go on with an interrupted run.
        quiet: no progress bars and no tables.
    """

    kind: str = "report"
    sources: tuple[Source, ...] = ()
    text: tuple[str, ...] = ()
    text_field: str = "text"
    dataset: str | None = None
    split: str = "test"
    device: str | None = None
    dtype: str | None = None
    backend: str = "auto"
    context: int = 512
    stride: int | None = None
    windows: int = 16
    ppl: parity.ParityOptions = field(default_factory=parity.ParityOptions)
    speed: speed.SpeedOptions = field(default_factory=speed.SpeedOptions)
    output: str = "hf-gdn-report"
    resume: bool = False
    quiet: bool = False


def _check(job: EvalJob) -> None:
    """Raise UserError for what can be seen to be wrong before anything is loaded."""
    try:
        registry.check_backend(job.backend)
    except ValueError as error:
        raise UserError(str(error)) from error
    if job.text and job.dataset is not None:
        raise UserError("--text and --dataset were both given; expected one of them")
    if job.context < 2 or job.windows < 0:
        raise UserError(f"--context must be at least 2 and --windows 0 or more, got {job.context} and {job.windows}")
    parity.check(job.ppl)


def _read_text(job: EvalJob) -> texts.Text:
    if job.dataset is not None:
        return texts.read_dataset(job.dataset, job.split, job.text_field)
    return texts.read_files(job.text, job.text_field) if job.text else texts.embedded()


def _tokens(job: EvalJob, loaded: Loaded, text: texts.Text) -> tuple[Tensor, str]:
    """Tokens ``[L]`` to be scored, and where they are from; random ones for a model without tokenizer."""
    if loaded.tokenizer is not None:
        return texts.tokenize(loaded.tokenizer, text), text.source
    random = torch.Generator().manual_seed(0)
    length = (job.windows or 16) * job.context
    return torch.randint(0, loaded.config.vocab_size, (length,), generator=random), "random tokens"


def evaluate(job: EvalJob, source: Source, text: texts.Text, device: torch.device, work: Work) -> dict[str, Any]:
    """Evaluate one model: its entry in the report, in the main process; an empty dict in the others."""
    dtype = models.pick_dtype(job.dtype, source.name, device)
    ranks = work.ranks

    with work.bars.busy(f"loading {source.label}"):
        loaded = ranks.each(lambda: models.load(source, device, dtype))
        ids, origin = _tokens(job, loaded, text)
    try:
        result = ranks.each(lambda: _manifest(job, loaded))  # a backend that cannot serve raises here, before any work
        _measure(job, loaded, ids, origin, work, result)
    except PatchError as error:  # the same in all processes, which have the same transformers
        result = {**_describe(loaded), "not_patched": str(error)}
    if not ranks.main:
        return {}
    parts = [result[part]["passed"] for part in ("parity", "speed") if part in result]
    result["passed"] = "not_patched" not in result and all(parts)
    return result


def _measure(job: EvalJob, loaded: Loaded, ids: Tensor, origin: str, work: Work, result: dict[str, Any]) -> None:
    """Fill in the parts of a result that the job asks for."""
    if job.kind != "speed":
        windows = texts.windows(ids, job.context, job.stride, job.windows or None, origin)
        result["parity"] = parity.measure(loaded, windows, origin, job.ppl, job.backend, work)
    if job.kind != "ppl":
        prompts = None if loaded.tokenizer is None else ids
        result["speed"] = speed.measure(loaded, prompts, job.speed, job.backend, work)


def _manifest(job: EvalJob, loaded: Loaded) -> dict[str, Any]:
    """What is evaluated and on which code it runs. Raises PatchError where the model's family cannot be patched."""
    with patched(loaded.families, backend=job.backend, strict=True):
        kernels = layer_kernels(loaded.model)
    return {**_describe(loaded), "baseline": machine.baseline(loaded.families), "kernels": kernels}


def _describe(loaded: Loaded) -> dict[str, Any]:
    """The model."""
    config, source = loaded.model.config, loaded.source
    return {
        "model": source.label,
        "name": source.name,
        "revision": configs.commit(config) or source.revision,
        "model_type": config.model_type,
        "random_weights": source.random,
        "settings": list(source.settings),
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "dtype": loaded.dtype,
        "attention": configs.attention_implementation(loaded.config),
        "device_map": {
            name: str(place) for name, place in (getattr(loaded.model, "hf_device_map", None) or {}).items()
        },
        "tensor_parallel": source.tensor_parallel,
        "baseline": {},
        "kernels": {},
    }


def build(job: EvalJob, ranks: Processes, command: str) -> dict[str, Any]:
    """Run a job.

    Returns:
        The report (docs/report.md) in the main process, an empty dict in the others.

    Raises:
        UserError: something given cannot be used; nothing is overwritten then.
    """
    _check(job)
    device = models.pick_device(job.device, ranks)
    sources = job.sources or tuple(Source(name) for name in models.embedded())
    job = replace(job, sources=sources)
    speed.plan(job.speed, device)
    results = []
    with progress.bars(ranks.main and not job.quiet) as bars:
        with bars.busy("reading the text"):
            text = ranks.each(lambda: _read_text(job))
        told = {name: value for name, value in asdict(job).items() if name not in ("output", "resume", "quiet")}
        told["text_sha256"] = hashlib.sha256(text.text.encode()).hexdigest()
        journal = ranks.main_only(lambda: _journal(told, device, job.output, job.resume))
        for number, source in enumerate(sources):
            work = Work(ranks, journal, bars, f"{number}-")
            results.append(evaluate(job, source, text, device, work))
    if journal is None:
        return {}
    report = {
        **_head(job.kind, command, ranks, device),
        "backend": job.backend,
        "results": results,
        "passed": all(result["passed"] for result in results),
    }
    write(report, prepare(job.output))
    journal.remove()
    return report


def build_kernels(
    options: kernel_bench.KernelBenchOptions, output: str, resume: bool, quiet: bool, ranks: Processes, command: str
) -> dict[str, Any]:
    """Time kernels; arguments and result as for `build`."""
    options = replace(options, device=str(models.pick_device(options.device, ranks)))
    cases = {kernel_bench.key(case): case for case in ranks.each(lambda: kernel_bench.plan(options))}
    device, dtype = kernel_bench.target(options)
    journal = ranks.main_only(lambda: _journal({"kind": "kernels", **asdict(options)}, device, output, resume))
    with progress.bars(ranks.main and not quiet) as bars:
        work = Work(ranks, journal, bars)
        step = bars.add("kernels", len(work.todo(cases)), "rows")

        def compute(key: str) -> dict[str, Any]:
            row = kernel_bench.measure(cases[key], options)
            step(1)
            return row

        rows = work.fill(cases, compute, spread=False)
        if journal is None:
            return {}
        with bars.busy("this machine's ceilings"):
            limits = kernel_bench.ceilings(device, dtype)
    rows = kernel_bench.with_shares(kernel_bench.with_ratios(rows), limits)
    report = {
        **_head("kernels", command, ranks, device),
        "ceilings": limits,
        "left_out": kernel_bench.left_out(options),
        "results": [],
        "kernels": rows,
        "passed": all(row["passed"] is not False for row in rows),
    }
    write(report, prepare(output))
    journal.remove()
    return report


def _journal(told: dict[str, Any], device: torch.device, output: str, resume: bool) -> Journal:
    told = {**told, "schema": SCHEMA, "machine": machine.machine(device), "versions": machine.versions()}
    return Journal(prepare(output), told, resume)


def _head(kind: str, command: str, ranks: Processes, device: torch.device) -> dict[str, Any]:
    """What every report says of itself."""
    made = machine.made_with(kind, command, device)
    return {"schema": SCHEMA, "hf_gdn": __version__, "processes": ranks.count, **made}


FILES: dict[str, Callable[[dict[str, Any]], str]] = {
    "report.json": writers.to_json,
    "report.md": writers.to_markdown,
    "report.csv": writers.to_csv,
    "report.html": html.to_html,
}


def write(report: dict[str, Any], folder: Path) -> None:
    """Write the report in all formats, each file whole or not at all."""
    texts = {name: make(report) for name, make in FILES.items()}
    for name, text in texts.items():
        put(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def show(report: dict[str, Any], folder: str, quiet: bool) -> None:
    """Print the report; when quiet, its verdict alone."""
    console = machine.console()
    if not quiet:
        for sheet in tables.of_report(report):
            table = Table(
                *sheet.header, title=sheet.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
            )
            for row in sheet.rows:
                table.add_row(*map(escape, row))
            console.print(table)
        for name, value in writers.conditions(report):
            console.print(f"{name}: {value}", style="dim", highlight=False, markup=False)
    style = "bold green" if report["passed"] else "bold red"
    console.print(writers.verdict(report), style=style, highlight=False, markup=False)
    console.print(f"wrote {', '.join(str(Path(folder) / name) for name in FILES)}", highlight=False, markup=False)


def main(job: EvalJob, command: str) -> int:
    """Run a job, write its report and show it. Returns the exit code (docs/report.md), in all processes."""
    ranks = Processes(job.device, any(source.tensor_parallel for source in job.sources))
    return _main(job.output, job.quiet, ranks, lambda: build(job, ranks, command))


def main_kernels(options: kernel_bench.KernelBenchOptions, output: str, resume: bool, quiet: bool, command: str) -> int:
    """The same for kernels."""
    ranks = Processes(options.device)
    return _main(output, quiet, ranks, lambda: build_kernels(options, output, resume, quiet, ranks, command))


def exit_code(report: dict[str, Any]) -> int:
    """2 where a model could not be patched at all, 1 where something else did not pass, else 0."""
    if any("not_patched" in result for result in report["results"]):
        return 2
    return 0 if report["passed"] else 1


def _main(output: str, quiet: bool, ranks: Processes, run: Callable[[], dict[str, Any]]) -> int:
    try:
        report = run()
        if ranks.main:
            show(report, output, quiet)
        return ranks.from_main(lambda: exit_code(report))
    finally:
        ranks.close()
