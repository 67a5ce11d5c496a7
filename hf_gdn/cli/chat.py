"""hf-gdn chat: talk to a model."""

from __future__ import annotations

from typing import Annotated

import typer

from ..chat.options import ChatOptions
from ..loading.options import DeviceOptions
from .app import USE, command, stop


@command(
    panel=USE,
    needs=("jinja2", "rich"),
    examples=["hf-gdn chat", "hf-gdn chat ./my-model --window 8192", "hf-gdn chat --temperature 0 --max-new-tokens 64"],
)
def chat(
    chat: ChatOptions,
    device: DeviceOptions,
    model: Annotated[str | None, typer.Argument(help="Folder or hub name; an embedded model by default.")] = None,
) -> None:
    """Talk to a model in the terminal, for as long as you like, in fixed memory (attention sinks)."""
    from ..chat import terminal

    try:
        terminal.main(model, chat, device)
    except KeyboardInterrupt:
        stop("interrupted", 130)
