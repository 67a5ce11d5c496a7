"""How tests run commands, and options that make them quick."""

import os
import subprocess
import sys

from typer.testing import CliRunner

from hf_gdn.cli.app import app

PARITY = ("--context", "64", "--windows", "4")
SPEED = ("--batch", "1,2", "--prompt", "8,16", "--new-tokens", "4", "--rounds", "1")


def run(*arguments, **env):
    """The command in a process of its own: exit code, output, error output."""
    done = subprocess.run(
        [sys.executable, "-m", "hf_gdn", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def invoke(*arguments):
    """The command in this process."""
    return CliRunner().invoke(app, list(map(str, arguments)))
