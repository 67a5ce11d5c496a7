"""hf-gdn run: a program in this process, with patched models. It needs no package beyond hf_gdn's own.

The program sees what ``python PROGRAM`` or ``python -m MODULE`` would give it: ``__main__``, ``sys.argv``,
``sys.path``, its own exit code, and tracebacks that begin with its own lines.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import io
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from ..errors import BackendError, PatchError, UserError
from ..options import option

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
    """Parse the arguments of ``hf-gdn run``, patch, and run the program.

    Raises:
        UserError: there is no such program, or an unknown backend; BackendError, PatchError: as `hf_gdn.patch`.
        Whatever the program raises, SystemExit included.
    """
    parser = argparse.ArgumentParser(prog="hf-gdn run", usage=USAGE, allow_abbrev=False)
    for field in fields(RunOptions):
        name, flag = f"--{field.name.replace('_', '-')}", field.default is False
        parser.add_argument(name, default=field.default, **(dict(action="store_true") if flag else {}))  # type: ignore[arg-type]
    parser.add_argument("-m", dest="module", action="store_true")
    parser.add_argument("program", nargs=argparse.REMAINDER)
    given = vars(parser.parse_args(arguments))
    module, program = given.pop("module"), given.pop("program")
    if not program:
        parser.error("expected a PROGRAM, or -m MODULE")
    try:
        start = prepare(RunOptions(**given), module, program)
    except (UserError, BackendError, PatchError) as error:
        print(f"hf-gdn: {error}", file=sys.stderr)
        sys.exit(2)
    start()


def prepare(options: RunOptions, module: bool, program: Sequence[str]) -> Callable[[], None]:
    """Patch, and return the function that runs a program; `program` is its name and its arguments."""
    run = _module(program) if module else _file(program)
    from .. import patch

    try:
        patch(backend=options.backend, strict=options.strict, cuda_graphs=options.cuda_graphs)
    except ValueError as error:
        raise UserError(f"--backend: {error}") from error
    if options.summary:
        atexit.register(lambda: print(summary(), file=sys.stderr))
    own, shown = Path(__file__).parent.parent, sys.excepthook

    def without_us(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        shown(kind, error.with_traceback(_theirs(traceback, own)), _theirs(traceback, own))

    sys.excepthook = without_us
    return run


def _theirs(traceback: TracebackType | None, own: Path) -> TracebackType | None:
    """A traceback without its first frames if they are of hf_gdn's commands, of runpy or of Python's launcher."""
    found = traceback
    while found is not None:
        name = found.tb_frame.f_code.co_filename
        if name != "<frozen runpy>" and Path(name).name not in ("runpy.py", "hf-gdn") and own not in Path(name).parents:
            return found
        found = found.tb_next
    return traceback  # the error is ours


def _search(folder: Path) -> None:
    """Make a folder the first that imports look in, as Python does for a program; not with ``python -P``."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(folder)


def _module(program: Sequence[str]) -> Callable[[], None]:
    def run() -> None:
        sys.argv[:] = program
        _search(Path.cwd())
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)

    return run


def _run_folder(program: Sequence[str]) -> None:
    """Run the ``__main__.py`` of a folder or an archive."""
    sys.argv[:] = program
    runpy.run_path(program[0], run_name="__main__")


def _file(program: Sequence[str]) -> Callable[[], None]:
    path = Path(program[0])
    if path.is_dir() or path.suffix == ".zip":
        return functools.partial(_run_folder, program)
    try:
        with io.open_code(str(path.absolute())) as file:
            source = file.read()
    except OSError as error:
        raise UserError(f"program {program[0]!r} cannot be read: {error.strerror}") from error

    def run() -> None:
        # A module of its own that stays: what the program leaves behind (threads, atexit, pickles) finds its globals.
        main = types.ModuleType("__main__")
        vars(main).update(__file__=str(path), __builtins__=__builtins__)
        sys.argv[:] = program
        _search(path.absolute().parent)
        sys.modules["__main__"] = main
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(main))

    return run


def summary() -> str:
    """One line: patched families with the layers that ran, the backends of ops, and what fell back."""
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
