"""hf-gdn chat: talk to a model."""

from __future__ import annotations

from typing import Annotated

import typer

from ..chat.options import ChatOptions
from ..errors import UserError
from ..loading.options import DeviceOptions
from .app import USE, command, stop


@command(
    panel=USE,
    needs=("jinja2", "rich"),
    examples=["hf-gdn chat", "hf-gdn chat ./my-model --window 8192", "hf-gdn chat --model ./my-model --greedy"],
)
def chat(
    chat: ChatOptions,
    device: DeviceOptions,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub name; an embedded model by default.")
    ] = None,
    option: Annotated[str | None, typer.Option("--model", help="The same, as other commands take it.")] = None,
) -> None:
    """Talk to a model in the terminal, for as long as you like, in fixed memory (attention sinks)."""
    from ..chat import terminal

    if model is not None and option is not None:
        raise UserError(f"two models were given, {model} and --model {option}; expected one of them")
    try:
        terminal.main(option if model is None else model, chat, device)
    except KeyboardInterrupt:
        stop("interrupted", 130)
