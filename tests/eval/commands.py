"""How tests run commands, and options that make them quick."""

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from hf_gdn.cli.app import app

PARITY = ("--context", "64", "--windows", "4")
QUICK = ("--variant", "eager", "--batch", "1", "--prompt", "8", "--new-tokens", "3", "--rounds", "1")
SPEED = ("--variant", "eager", "--batch", "1,2", "--prompt", "8,16", "--new-tokens", "4", "--rounds", "1")


def run(*arguments, **env):
    """The command in a process of its own: exit code, output, error output."""
    done = subprocess.run(
        [sys.executable, "-m", "hf_gdn", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def invoke(*arguments):
    """The command in this process."""
    return CliRunner().invoke(app, list(map(str, arguments)))


def launch(tmp_path, *arguments, script=None):
    """The command in two processes of accelerate's launcher: exit code, output, error output."""
    target = [str(script)] if script else ["-m", "hf_gdn.eval"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
            *target,
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return done.returncode, done.stdout, done.stderr
