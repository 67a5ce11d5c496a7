"""What may stand in the shell blocks of README and docs: a rule for each program, which parses the line."""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
import tomllib
import typer
import typer.main
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import hf_gdn
from hf_gdn.cli.app import app

ROOT = Path(hf_gdn.__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


class Wrong(Exception):
    """A line that no rule covers, or that names what does not exist."""


def blocks(text: str, kind: str) -> list[str]:
    """The fenced blocks of a page whose language is `kind`."""
    return [block for name, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if name == kind]


def lines(text: str) -> list[str]:
    """The commands in a page's blocks without a language: the shell's."""
    joined = [line for block in blocks(text, "") for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line for line in (re.sub(r"\s+# .*|^#.*", "", line).strip() for line in joined) if line]


def inline(text: str) -> list[str]:
    """The commands that a page names inside its sentences and tables."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [span for span in spans if re.match(rf"([A-Z_]+=\S* )*(\S+/)?({'|'.join(RULES)}) ", span)]


def check(line: str, complete: bool = True) -> None:
    """Parse a line as its program would; … stands for a name.

    Args:
        line: the line.
        complete: whether all arguments have to be there that the program asks for.

    Raises:
        Wrong: no rule covers the line, or what it names is not in the repository.
        SystemExit, or an error of its program's parser: the program refuses it.
    """
    line = line if complete else line.removesuffix(" …")  # and so on
    words = shlex.split(line.replace("…", "NAME"), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        _variable(words.pop(0))
    program = words[0].rpartition("/")[2] if words else ""
    if program not in RULES:
        raise Wrong(f"no rule covers {line!r}; rules: {', '.join(RULES)}")
    try:
        RULES[program](words[1:])
    except Exception as error:
        if complete or type(error).__name__ != "MissingParameter":  # typer has copies of click's exceptions
            raise


def _variable(assignment: str) -> None:
    name = assignment.partition("=")[0]
    if name != "TRITON_INTERPRET" and not any(name in p.read_text("utf-8") for p in (ROOT / "hf_gdn").rglob("*.py")):
        raise Wrong(f"nothing reads {name}")


def _hf_gdn(words: list[str]) -> None:
    if not words:
        return
    command = typer.main.get_command(app)
    name = next((word for word in words if not word.startswith("-")), None)
    try:
        command.make_context("hf-gdn", list(words))  # the options before the command
        if name not in command.commands:
            raise Wrong(f"hf-gdn has no command {name!r}; commands: {', '.join(command.commands)}")
        found = command.commands[name].make_context(name, words[words.index(name) + 1 :])
        if name == "run" and found.params["module"]:
            _module(found.params["program"][0])
    except typer.Exit:  # --help, --version
        pass


def _module(name: str) -> None:
    """A module of a package that is installed here exists."""
    if importlib.util.find_spec(name.partition(".")[0]) is not None and importlib.util.find_spec(name) is None:
        raise Wrong(f"no module {name}")


def _make(words: list[str]) -> None:
    targets = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[0].split()
    for word in words:
        name, given, _ = word.partition("=")
        if given and f"$({name})" not in MAKEFILE:
            raise Wrong(f"the Makefile has no variable {name}")
        if not given and name not in targets:
            raise Wrong(f"the Makefile has no target {name}; targets: {', '.join(targets)}")


def _pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    if words[0] != "install" or len(words) == 1:
        raise Wrong(f"pip {' '.join(words)} is not an installation")
    for word in words[1:]:
        found = re.fullmatch(r"(?:\.|hf-gdn)(?:\[([\w,]+)\])?", word)
        if not found:
            raise Wrong(f"pip would install {word!r}, not hf-gdn")
        unknown = set((found[1] or "").split(",")) - {*extras, ""}
        if unknown:
            raise Wrong(f"pyproject.toml has no extra {', '.join(unknown)}; extras: {', '.join(extras)}")


class _Pytest:
    """Knows the options and markers of the pytest that runs this."""

    config: pytest.Config

    def __call__(self, words: list[str]) -> None:
        markers = [marker.partition(":")[0] for marker in self.config.getini("markers")]
        words = list(words)
        while words:
            word = words.pop(0)
            if word == "-m":
                unknown = set(re.findall(r"\w+", words.pop(0))) - {*markers, "not", "and", "or"}
                if unknown:
                    raise Wrong(f"pytest has no marker {', '.join(unknown)}; markers: {', '.join(markers)}")
            elif word.startswith("--"):
                self.config.getoption(word, skip=False)  # raises ValueError for an unknown one
            elif word.startswith("-"):
                raise Wrong(f"no rule covers pytest's option {word}")
            elif not (ROOT / word.partition("::")[0]).exists():
                raise Wrong(f"there is no file {word}")


class _ParsedError(Exception):
    """A script has parsed its arguments."""


def _script(words: list[str]) -> None:
    """Run a script of this repository until it has parsed its arguments."""
    path = ROOT / words[0]
    if not path.is_file():
        raise Wrong(f"there is no script {words[0]}")
    original = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        original(parser, *args, **kwargs)
        raise _ParsedError

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse),
        mock.patch.object(sys, "argv", words),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except _ParsedError:
            return
    raise Wrong(f"{words[0]} parses no arguments")


def _python(words: list[str]) -> None:
    if words[0] != "-m":
        _script(words)
    elif words[1] in ("hf_gdn", "hf_gdn.eval"):
        _hf_gdn(words[2:])
    elif words[1] == "pytest":
        PYTEST(words[2:])
    else:
        raise Wrong(f"no rule covers python -m {words[1]}")


def _launcher(parser: argparse.ArgumentParser, words: list[str]) -> None:
    given = parser.parse_args(words)
    _python([*(["-m"] if given.module else []), given.training_script, *given.training_script_args])


def _accelerate(words: list[str]) -> None:
    if words[0] != "launch":
        raise Wrong(f"no rule covers accelerate {words[0]}")
    _launcher(launch_command_parser(), words[1:])


def _pre_commit(words: list[str]) -> None:
    if words != ["install"] or not (ROOT / ".pre-commit-config.yaml").exists():
        raise Wrong(f"no rule covers pre-commit {' '.join(words)}")


PYTEST = _Pytest()
RULES = {
    "hf-gdn": _hf_gdn,
    "make": _make,
    "pip": _pip,
    "pytest": PYTEST,
    "python": _python,
    "accelerate": _accelerate,
    "torchrun": lambda words: _launcher(get_args_parser(), words),
    "pre-commit": _pre_commit,
}
