"""The command line: finds the commands beside it, turns their option groups into options, and words errors.

A command is a function in a file of its own, with `command` above it. Nothing here or at the top of such a file imports
torch: help and mistakes in options are answered at once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from .. import __version__
from ..errors import BackendError, PatchError, RankFailure, UserError
from .options import expanded

if TYPE_CHECKING:
    from ..eval.job import Job

Command = TypeVar("Command", bound=Callable[..., Any])
COMPARE, MEASURE, USE = PANELS = "Compare original and patched", "Measure parts", "Use"  # of the list of commands

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


REPORTING = ("jinja2", "matplotlib", "psutil", "rich")  # what reports are written with


def command(
    *, panel: str, examples: Sequence[str], needs: Sequence[str] = REPORTING, interspersed: bool = True
) -> Callable[[Command], Command]:
    """Make a command of a function, named after it.

    Args:
        panel: under which heading the list of commands shows it.
        examples: command lines that the help ends in.
        needs: packages of the extra without which it is refused at once, rather than when it comes to import them.
        interspersed: whether options may follow arguments; else these belong to the last argument.
    """

    def add(function: Command) -> Command:
        # Help joins lines that no empty one parts.
        epilog = "\n\n".join(["Examples:", *(f"  {example}" for example in examples)])
        name = function.__name__.replace("_", "-")
        called = expanded(function)

        @functools.wraps(called)
        def checked(**given: Any) -> Any:
            for package in needs:
                if importlib.util.find_spec(package) is None:
                    raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            return called(**given)

        settings = {"allow_interspersed_args": interspersed}
        app.command(name, epilog=epilog, rich_help_panel=panel, context_settings=settings)(checked)
        return function

    return add


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-gdn {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]


@app.callback()
def _root(version: Version = False) -> None:
    """Fused kernels for the Gated DeltaNet and Kimi Delta Attention layers of Hugging Face transformers."""


def run(job: Job) -> None:
    """Run a job and exit with its code."""
    from ..eval import job as jobs

    try:
        code = jobs.run(job, shlex.join(["hf-gdn", *sys.argv[1:]]))
    except KeyboardInterrupt:
        stop(f"interrupted; --resume --output {job.output.output} with the same options goes on from here", 130)
    if code:
        raise typer.Exit(code)


def main() -> None:
    """Entry point: prints errors a user can mend as one line and exits 2. Of several processes the first one prints."""
    import huggingface_hub
    import transformers

    from ..upstream import versions

    transformers.logging.set_verbosity_error()  # that its own functions are slow is what the report is about
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()  # not a line for every attempt to reach a hub that is not there
    try:
        versions.check()
        app()
    except (UserError, BackendError, PatchError) as error:
        stop(str(error), 2)
    except RankFailure as error:
        stop(str(error), 1)


def stop(text: str, code: int) -> NoReturn:
    """Print a line and exit."""
    if os.environ.get("RANK", "0") == "0":
        print(f"hf-gdn: {text}", file=sys.stderr)
    else:
        time.sleep(2)  # a launcher ends all processes when one has; let the first print before
    sys.exit(code)


for _module in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if _module.name not in ("app", "options"):
        importlib.import_module(f"{__package__}.{_module.name}")
app.registered_commands.sort(key=lambda found: PANELS.index(str(found.rich_help_panel)))
