"""hf-gdn: report, ppl, speed, kernels, stream, chat, compare, env; `accelerate launch -m hf_gdn.eval` is the same.

Exit codes: 0 passed; 1 not the same model, or slower than before; 2 something given cannot be used, or the installed
transformers does not fit the model's family; 130 interrupted.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import __version__
from .errors import BackendError, PatchError, RankFailure, UserError

if TYPE_CHECKING:
    from .eval.job import EvalJob

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

# ------------------------------------------------------------------------------------------------------------- options

Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Folder or hub name, repeatable; the two embedded models by default."),
]
Config = Annotated[
    str | None,
    typer.Option(
        help="Random weights at this config: qwen3_next-80b, kimi_linear-48b, an embedded model's, or a path."
    ),
]
Layers = Annotated[int | None, typer.Option(min=1, help="Keep only the first N layers of --config.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Change a field of --config, e.g. num_experts=16.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
Attention = Annotated[
    str | None, typer.Option("--attn", help="Attention implementation; transformers' choice by default.")
]
DeviceMap = Annotated[str | None, typer.Option(help="Spread a model over devices: auto, balanced, ...")]
TensorParallel = Annotated[
    bool, typer.Option("--tp", help="Split a model over the processes by its tensor-parallel plan.")
]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help=".txt, .jsonl or .parquet, repeatable; held-out standard library modules by default."),
]
Field = Annotated[str, typer.Option(help="Name of the text field in .jsonl and .parquet files and data sets.")]
Dataset = Annotated[str | None, typer.Option(help="Data set to score: NAME or NAME:CONFIG.")]
Split = Annotated[str, typer.Option(help="Split of --dataset.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the first GPU if there is one by default.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; float32 on a CPU and for the embedded models by default."),
]
Backend = Annotated[str, typer.Option(help="Backend: auto, or a name; a named backend serves every call or raises.")]
Context = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
Stride = Annotated[
    int | None, typer.Option(min=1, help="Tokens from one window's start to the next; --context by default.")
]
Windows = Annotated[
    int, typer.Option(min=0, help="Number of windows to score, evenly spread over the text; 0 for all.")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Windows per forward; chosen by the size of the logits by default.")
]
Mode = Annotated[
    str, typer.Option(help="How the text is processed: prefill, decode, mixed; separate several with commas.")
]
Tolerance = Annotated[
    list[str] | None,
    typer.Option(help="Change a bound of the verdict, repeatable: ppl_ratio=VALUE, kl_mean=VALUE, same_top=VALUE."),
]
Batch = Annotated[str, typer.Option(help="Batch sizes, separated by commas; 1,8 on a GPU, 1,4 elsewhere by default.")]
Prompt = Annotated[
    str, typer.Option(help="Prompt lengths, separated by commas; 512,4096 on a GPU, 128,512 elsewhere by default.")
]
NewTokens = Annotated[int | None, typer.Option(min=2, help="Tokens to generate; 128, or 64 on a CPU, by default.")]
Rounds = Annotated[int, typer.Option(min=1, help="Number of timed calls of each side, after the warm-up.")]
Variant = Annotated[
    str,
    typer.Option(help="How generate runs: eager, static, compile, graph (a CUDA graph); separate several with commas."),
]
OUTPUT = typer.Option(help="Folder for report.json, .md, .csv and .html.")
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in the output folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the verdict: no progress bars, no tables.")]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _sizes(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in _names(text))
    except ValueError as error:
        raise UserError(f"{option} {text}: expected whole numbers with commas between them, e.g. 1,8") from error


def _job(kind: str, given: dict[str, Any]) -> EvalJob:
    """A job from a command's options, as they are called in Python."""
    from .eval import parity, speed
    from .eval.job import EvalJob
    from .loading.models import Source

    names, config = given.pop("model") or (), given.pop("config")
    layers, settings = given.pop("layers"), tuple(given.pop("set") or ())
    if config is not None and names:
        raise UserError("--model and --config were both given; expected one of them")
    if config is None and (layers is not None or settings):
        raise UserError("--layers and --set change a --config, and none was given")
    where = {
        "revision": given.pop("revision"),
        "attention": given.pop("attn"),
        "device_map": given.pop("device_map"),
        "tensor_parallel": given.pop("tp"),
    }
    if config is not None:
        sources: tuple[Source, ...] = (Source(config, random=True, layers=layers, settings=settings, **where),)
    else:
        sources = tuple(Source(name, **where) for name in names)
    job: dict[str, Any] = {"text_field": given.pop("field", "text")}
    if kind != "speed":
        job["ppl"] = parity.ParityOptions(
            _names(given.pop("mode")), given.pop("batch_size"), tuple(given.pop("tolerance") or ())
        )
    if kind != "ppl":
        job["speed"] = speed.SpeedOptions(
            _sizes("--batch", given.pop("batch")),
            _sizes("--prompt", given.pop("prompt")),
            given.pop("new_tokens"),
            given.pop("rounds"),
            _names(given.pop("variant")),
        )
    return EvalJob(kind=kind, sources=sources, text=tuple(given.pop("text") or ()), **job, **given)


def _run(kind: str, given: dict[str, Any]) -> None:
    from .eval import job as jobs

    job = _job(kind, given)
    _finish(job.output, lambda: jobs.main(job, _command()))


def _command() -> str:
    return shlex.join(["hf-gdn", *sys.argv[1:]])


def _finish(output: str, run: Callable[[], int]) -> None:
    """Run, and exit with the code that it returns."""
    try:
        code = run()
    except KeyboardInterrupt:
        _stop(f"interrupted; --resume --output {output} with the same options goes on from here", 130)
    if code:
        raise typer.Exit(code)


# ------------------------------------------------------------------------------------------------------------- commands


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-gdn {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]


@app.callback()
def _root(version: Version = False) -> None:
    """Fused kernels for the Gated DeltaNet and Kimi Delta Attention layers of Hugging Face transformers."""


@app.command()
def report(
    model: Models = None,
    config: Config = None,
    layers: Layers = None,
    set: Settings = None,
    revision: Revision = None,
    attn: Attention = None,
    device_map: DeviceMap = None,
    tp: TensorParallel = False,
    text: Texts = None,
    field: Field = "text",
    dataset: Dataset = None,
    split: Split = "test",
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    context: Context = 512,
    stride: Stride = None,
    windows: Windows = 16,
    batch_size: BatchSize = None,
    mode: Mode = "prefill,decode,mixed",
    tolerance: Tolerance = None,
    batch: Batch = "",
    prompt: Prompt = "",
    new_tokens: NewTokens = None,
    rounds: Rounds = 5,
    variant: Variant = "eager",
    output: Annotated[str, OUTPUT] = "hf-gdn-report",
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Is the patched model still the same, and how much faster does it generate? Exits 1 when it is not the same."""
    _run("report", dict(locals()))


@app.command()
def ppl(
    model: Models = None,
    config: Config = None,
    layers: Layers = None,
    set: Settings = None,
    revision: Revision = None,
    attn: Attention = None,
    device_map: DeviceMap = None,
    tp: TensorParallel = False,
    text: Texts = None,
    field: Field = "text",
    dataset: Dataset = None,
    split: Split = "test",
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    context: Context = 512,
    stride: Stride = None,
    windows: Windows = 16,
    batch_size: BatchSize = None,
    mode: Mode = "prefill",
    tolerance: Tolerance = None,
    output: Annotated[str, OUTPUT] = "hf-gdn-ppl",
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity, KL divergence and other distances of the patched model from the original. Exits 1 when too large."""
    _run("ppl", dict(locals()))


@app.command()
def speed(
    model: Models = None,
    config: Config = None,
    layers: Layers = None,
    set: Settings = None,
    revision: Revision = None,
    attn: Attention = None,
    device_map: DeviceMap = None,
    tp: TensorParallel = False,
    text: Texts = None,
    field: Field = "text",
    dataset: Dataset = None,
    split: Split = "test",
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    batch: Batch = "",
    prompt: Prompt = "",
    new_tokens: NewTokens = None,
    rounds: Rounds = 5,
    variant: Variant = "eager",
    output: Annotated[str, OUTPUT] = "hf-gdn-speed",
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Time to first token, time per token and memory of generate, original and patched in turns."""
    _run("speed", dict(locals()))


@app.command()
def kernels(
    shape: Annotated[
        str, typer.Option(help="Named shapes, separated by commas: qwen3_next-80b, kimi_linear-48b, ...")
    ] = "",
    op: Annotated[str, typer.Option(help="Ops, separated by commas; all ops of the shapes by default.")] = "",
    backend: Annotated[
        str, typer.Option(help="Backends, separated by commas; every backend that serves by default.")
    ] = "",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "",
    tokens: Annotated[str, typer.Option(help="Sequence lengths for chunk ops, separated by commas.")] = "",
    direction: Annotated[str, typer.Option(help="forward, backward (the two together), or both.")] = "forward",
    device: Device = None,
    dtype: Dtype = None,
    gpu_graph: Annotated[bool, typer.Option("--gpu-graph", help="Time replays of a CUDA graph.")] = False,
    seconds: Annotated[float, typer.Option(help="Seconds to spend on one measurement.")] = 1.0,
    output: Annotated[str, OUTPUT] = "hf-gdn-kernels",
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Time every op on every backend that serves it, error checked, against this machine's own ceilings."""
    from .eval import job as jobs
    from .eval.kernel_bench import KernelBenchOptions

    options = KernelBenchOptions(
        _names(shape),
        _names(op),
        _names(backend),
        _sizes("--batch", batch),
        _sizes("--tokens", tokens),
        _names(direction),
        dtype,
        device,
        gpu_graph,
        seconds,
    )
    _finish(output, lambda: jobs.main_kernels(options, output, resume, quiet, _command()))


@app.command()
def stream(
    model: Models = None,
    text: Texts = None,
    field: Field = "text",
    device: Device = None,
    dtype: Dtype = None,
    tokens: Annotated[int, typer.Option(min=2, help="Maximum number of tokens of the stream.")] = 50_000,
    context: Annotated[
        int, typer.Option(min=2, help="Number of tokens kept; use the length the model was trained on.")
    ] = 512,
    sinks: Annotated[int, typer.Option(min=1, help="How many of them are the first tokens (attention sinks).")] = 4,
    output: Annotated[str, typer.Option(help="Folder for stream.json and stream.svg.")] = "hf-gdn-stream",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Perplexity along one long stream: attention sinks, a plain window, everything kept, the window read anew."""
    from .eval import long_stream as job
    from .loading.models import Source

    sources = tuple(Source(name) for name in model or ())
    options = job.StreamOptions(tokens, context, sinks)
    _finish(
        output,
        lambda: job.main(sources, tuple(text or ()), field, options, device, dtype, output, quiet, _command()),
    )


@app.command()
def chat(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name; an embedded model by default.")] = None,
    sink_tokens: Annotated[int, typer.Option(min=1, help="Number of first tokens to keep (attention sinks).")] = 4,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Number of last tokens to keep; 4092, or 508 for embedded models, by default."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens in an answer.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature, 0 for greedy; the model's generation_config decides by default."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Nucleus sampling: cumulative probability to sample from; generation_config decides by default."
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of the random number generator for sampling.")] = None,
) -> None:
    """Talk to a model in the terminal, for as long as you like, in fixed memory (attention sinks)."""
    from .chat import terminal as job

    options = job.ChatOptions(sink_tokens, window, max_new_tokens, temperature, top_p)
    try:
        job.main(model, options, device, dtype, backend, seed)
    except KeyboardInterrupt:
        _stop("interrupted", 130)


@app.command()
def compare(
    before: Annotated[str, typer.Argument(help="A report.json.")],
    after: Annotated[str, typer.Argument(help="Another report.json of the same kind.")],
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Relative slow-down that does not count as a regression.")
    ] = 0.05,
) -> None:
    """Two reports side by side. Exits 1 when the second is a regression."""
    from .eval import compare as job

    if not job.main(before, after, tolerance):
        raise typer.Exit(1)


@app.command()
def env() -> None:
    """Which backend serves which op on this machine, and the versions."""
    from .eval import machine

    machine.show()


def main() -> None:
    """Entry point: prints errors a user can mend as one line and exits 2. Of several processes the first one prints."""
    import huggingface_hub
    import transformers

    from .upstream import versions

    transformers.logging.set_verbosity_error()  # that its own functions are slow is what the report is about
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()  # not a line for every attempt to reach a hub that is not there
    try:
        versions.check()
        app()
    except (UserError, BackendError, PatchError) as error:
        _stop(str(error), 2)
    except RankFailure as error:
        _stop(str(error), 1)


def _stop(text: str, code: int) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        print(f"hf-gdn: {text}", file=sys.stderr)
    else:
        time.sleep(2)  # a launcher ends all processes when one has; let the first print before
    sys.exit(code)


if __name__ == "__main__":
    main()
