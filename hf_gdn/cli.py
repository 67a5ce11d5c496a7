"""hf-gdn: report, kernels, env. Exit codes: 0 fine, 1 parity failed, 2 something given cannot be used."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

Backend = Annotated[str, typer.Option(help="Backend to run on: auto, or the name of one that then has to serve.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the best there is by default.")]


@app.callback()
def _root() -> None:
    """Fused kernels for the Gated DeltaNet and Kimi Delta Attention layers of Hugging Face transformers."""


@app.command()
def report(
    model: Annotated[
        list[str] | None, typer.Option(help="Model name or path, repeatable; the two embedded models by default.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="UTF-8 file to score; the standard library's held-out modules by default.")
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; float32 on a CPU and for the embedded models by default."),
    ] = None,
    output: Annotated[str, typer.Option(help="Folder for report.json and report.md.")] = "hf-gdn-report",
    backend: Backend = "auto",
    context: Annotated[int, typer.Option(min=16, help="Tokens a window.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows to score.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of generation.")] = 9,
) -> None:
    """Is the patched model still the same, and how much faster does it generate? Exits 1 when it is not the same."""
    from .eval import report as job

    options = job.Options(
        models=tuple(model or ()), text=text, device=device, dtype=dtype, backend=backend, context=context,
        windows=windows, new_tokens=new_tokens, rounds=rounds,
    )  # fmt: skip
    if not job.main(options, output):
        raise typer.Exit(1)


@app.command()
def kernels(
    device: Device = None,
    json_file: Annotated[str | None, typer.Option("--json", help="File for the rows, as JSON.")] = None,
) -> None:
    """Time every op on every backend that serves it, against transformers' own function, error checked."""
    from .eval import microbench

    if not microbench.main(device, json_file):
        raise typer.Exit(1)


@app.command()
def env() -> None:
    """Which backend serves which op on this machine, and the versions."""
    from .eval import machine

    machine.show()


def main() -> None:
    """Entry point: prints errors a user can mend as one line and exits 2."""
    import transformers

    from .patches import PatchError
    from .registry import BackendError

    transformers.logging.set_verbosity_error()  # that its own functions are slow is what the report is about
    transformers.logging.disable_progress_bar()
    try:
        app()
    except (UserError, BackendError, PatchError) as error:
        print(f"hf-gdn: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
