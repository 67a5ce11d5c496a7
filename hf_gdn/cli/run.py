"""hf-gdn run: a program of the user's with patched models."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import USE, command
from .program import RunOptions, prepare


@command(
    panel=USE,
    needs=(),
    examples=[
        "hf-gdn run train.py --epochs 3",
        "hf-gdn run --backend eager --summary -m lm_eval --model hf --tasks hellaswag",
    ],
    interspersed=False,
)
def run(
    options: RunOptions,
    program: Annotated[list[str], typer.Argument(metavar="PROGRAM [ARGS]", help="A Python file and its arguments.")],
    module: Annotated[bool, typer.Option("-m", help="PROGRAM is the name of a module, as for python -m.")] = False,
) -> None:
    """Run a Python program whose models are patched, without changing it; as python PROGRAM or python -m MODULE.

    accelerate launch -m hf_gdn run train.py, and torchrun -m hf_gdn run train.py, patch every process.
    """
    prepare(options, module, program)()
