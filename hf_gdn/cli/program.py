"""hf-gdn run: a program in this process, with patched models. It needs no package beyond hf_gdn's own.

The program sees what ``python PROGRAM`` or ``python -m MODULE`` would give it: ``__main__``, ``sys.argv``,
``sys.path``, its own exit code, and tracebacks that begin with its own lines.
"""

from __future__ import annotations

import argparse
import atexit
import builtins
import functools
import io
import pkgutil
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NoReturn

from ..errors import BackendError, PatchError, UserError
from ..options import option
from ..upstream.python import run_module_as_main
from .at_import import arrange

USAGE = "hf-gdn run [--backend B] [--cuda-graphs] [--strict] [--summary] PROGRAM [ARGS] | -m MODULE [ARGS]"


@dataclass(frozen=True)
class RunOptions:
    """How models are patched, as in `hf_gdn.patch`."""

    PANEL: ClassVar[str] = "Patching"
    backend: str = option("auto", "Backend: auto, or a name; a named backend serves every call or raises.")
    cuda_graphs: bool = option(False, "Replay decode steps from CUDA graphs (docs/cuda_graphs.md).")
    strict: bool = option(False, "Raise instead of running an original forward, or leaving a family original.")
    summary: bool = option(False, "Say at the end what was patched, which backends served, and what fell back.")


def main(arguments: Sequence[str]) -> None:
    """Parse the arguments of ``hf-gdn run``, and run the program with patched models.

    Raises:
        SystemExit: after a printed line: no such program, an unknown backend, or an error that `hf_gdn.patch` raises.
        Whatever the program raises, SystemExit included.
    """
    parser = argparse.ArgumentParser(prog="hf-gdn run", usage=USAGE, allow_abbrev=False)
    for field in fields(RunOptions):
        name, flag = f"--{field.name.replace('_', '-')}", field.default is False
        parser.add_argument(name, default=field.default, **(dict(action="store_true") if flag else {}))  # type: ignore[arg-type]
    parser.add_argument("-m", dest="module", action="store_true")
    parser.add_argument("program", nargs=argparse.REMAINDER)
    given = vars(parser.parse_args(_module_apart(arguments)))
    module, program = given.pop("module"), given.pop("program")
    if not program:
        parser.error("expected a PROGRAM, or -m MODULE")
    try:
        start = prepare(RunOptions(**given), module, program)
    except UserError as error:
        _stop(error)
    start()


def _stop(error: Exception) -> NoReturn:
    print(f"hf-gdn: {error}", file=sys.stderr)
    sys.exit(2)


def _module_apart(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``-mMODULE`` as two, as Python takes it too."""
    words, place = list(arguments), 0
    while place < len(words) and words[place].startswith("--"):
        place += 2 if words[place] == "--backend" else 1
    if place < len(words) and words[place].startswith("-m"):
        words[place : place + 1] = filter(None, ("-m", words[place][2:]))
    return words


def prepare(options: RunOptions, module: bool, program: Sequence[str]) -> Callable[[], None]:
    """Arrange that models are patched, and return the function that runs a program.

    Args:
        options: how models are patched: when the program imports the first (`at_import`).
        module: whether the program is a module.
        program: its name and its arguments.
    """
    run = functools.partial(_module, program) if module else _file(program)
    _check_backend(options.backend)
    if options.summary:
        atexit.register(lambda: print(summary(), file=sys.stderr))
    arrange(functools.partial(_patch, options))
    shown = sys.excepthook

    def without_us(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        shown(kind, error.with_traceback(_theirs(traceback)), _theirs(traceback))

    sys.excepthook = without_us
    return run


def _check_backend(backend: str) -> None:
    """Raise UserError for an unknown backend. Only for one that is not hf_gdn's own, torch has to be imported."""
    kernels = pkgutil.iter_modules([str(Path(__file__).parent.parent / "kernels")])
    if backend == "auto" or backend in (found.name for found in kernels if found.ispkg):
        return
    from ..registry import check_backend

    try:
        check_backend(backend)
    except ValueError as error:
        raise UserError(f"--backend: {error}") from error


def _patch(options: RunOptions) -> None:
    """Patch. Errors end the program, since they come from one of its imports."""
    try:
        from .. import patch

        patch(backend=options.backend, strict=options.strict, cuda_graphs=options.cuda_graphs)
    except (ValueError, BackendError, PatchError) as error:
        _stop(error)


def _run(start: Callable[..., Any], *arguments: Any) -> None:
    """Run a program. Its tracebacks begin after this frame."""
    start(*arguments)


def _theirs(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback without our frames, which are its first; all of it if no program was running."""
    found = traceback
    while found is not None and found.tb_frame.f_code is not _run.__code__:
        found = found.tb_next
    return traceback if found is None else found.tb_next


def _become(program: Sequence[str], folder: Path) -> types.ModuleType:
    """Make the arguments, the first folder of imports and ``__main__`` a program's, and return the latter.

    It is a module that stays: what the program leaves behind (threads, atexit, pickles) finds its globals.
    """
    sys.argv[:] = program
    if not getattr(sys.flags, "safe_path", False):  # python -P
        sys.path[0] = str(folder)
    ours, main = vars(sys.modules["__main__"]), types.ModuleType("__main__")
    given: dict[str, Any] = {"__annotations__": {}, "__cached__": None}  # by some versions of Python
    vars(main).update({name: value for name, value in given.items() if name in ours}, __builtins__=builtins)
    sys.modules["__main__"] = main
    return main


def _module(program: Sequence[str]) -> None:
    _become(["-m", *program[1:]], Path.cwd())
    # runpy.run_module would print a traceback for an unknown module, and take the globals away.
    _run(run_module_as_main, program[0])


def _folder(program: Sequence[str]) -> None:
    """Run the ``__main__.py`` of a folder or an archive."""
    path = Path(program[0]).absolute()
    _become(program, path)
    if sys.path[0] != str(path):
        sys.path.insert(0, str(path))
    _run(run_module_as_main, "__main__", False)


def _file(program: Sequence[str]) -> Callable[[], None]:
    path = Path(program[0]).absolute()
    if pkgutil.get_importer(str(path)) is not None:
        return functools.partial(_folder, program)
    try:
        with io.open_code(str(path)) as file:
            source = file.read()
    except OSError as error:
        raise UserError(f"program {program[0]!r} cannot be read: {error.strerror}") from error

    def run() -> None:
        main = _become(program, path.resolve().parent)
        vars(main).update(__file__=str(path), __loader__=SourceFileLoader("__main__", str(path)))
        try:
            code = compile(source, str(path), "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            sys.excepthook(type(error), error.with_traceback(None), None)  # no line of the program has run
            sys.exit(1)
        _run(exec, code, vars(main))

    return run


def summary() -> str:
    """One line: patched families with the layers that ran, the backends of ops, and what fell back."""
    if "hf_gdn.patches" not in sys.modules:
        return "hf_gdn: nothing was patched, since no model of a family was imported"
    from .. import log, registry
    from ..patches import in_force

    table = in_force.current()
    ran: dict[str, int] = {}
    for name, change in table.patches.items():
        plans: Any = getattr(change.layer.replacement, "plans", None)
        if plans is not None and plans.layers:
            ran[name] = plans.layers
    layers = ", ".join(f"{name} {count} layers" for name, count in ran.items()) or "no patched layer ran"
    ops = ", ".join(f"{op}: {backend}" for op, backend in sorted(registry.chosen())) or "no kernel was asked for"
    fell_back = "; ".join(sorted(log.warned)) or "nothing fell back"
    return f"hf_gdn: {len(table.patches)} families patched, {layers}; {ops}; {fell_back}"
