"""hf-gdn chat: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import os
import unicodedata

import torch
from rich.console import Console

from ..caches import SinkCache
from ..errors import UserError, reason
from ..loading import models
from ..loading.options import DeviceOptions
from ..patches import layer_kernels, patch, patched
from ..registry import check_backend
from .conversation import Conversation, Interrupt, window
from .options import ChatOptions

HELP = """/reset       begin anew
/save FILE   write the conversation, as text and token ids
/load FILE   go on with a saved conversation; it is read anew
/stats       tokens, memory of the cache, tokens per second
/help        this
/quit        end, as Ctrl-D does
Ctrl-C stops an answer and keeps the conversation; a line that ends in \\ goes on in the next."""


def _ask_line() -> str:
    """What the user types, over several lines where they end in a backslash."""
    line = input("> ")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(". ")
    return line.encode("utf-8", "replace").decode()  # bytes that are no text come as surrogates


def _harmless(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else ascii(c)[1:-1] for c in text)


def _command(line: str, chat: Conversation, console: Console) -> bool:
    """Do what a line that begins with / says; False to end."""
    name, _, rest = line.partition(" ")
    path = os.path.expanduser(rest.strip())
    if name == "/quit":
        return False
    if name in ("/save", "/load") and not path:
        raise UserError(f"{name} takes the name of a file: {name} FILE")
    if name == "/reset":
        chat.reset()
        said = "a new conversation"
    elif name == "/save":
        chat.save(path)
        said = f"{len(chat.ids):,} tokens written to {path}; /load reads them anew"
    elif name == "/load":
        with Interrupt() as stop:
            done = chat.load(path, stop)
        said = f"{len(chat.ids):,} tokens read from {path}" if done else "stopped; the conversation is as before"
    elif name in ("/stats", "/help"):
        said = chat.stats() if name == "/stats" else HELP
    else:
        raise UserError(f"unknown command {name}; commands: /reset /save /load /stats /help /quit")
    console.print(said, style="dim", markup=False, highlight=False, soft_wrap=True)
    return True


def _turn(chat: Conversation, console: Console) -> bool:
    """One line of the user's and what it brings; False to end."""
    try:
        line = _ask_line()
        if line.startswith("/"):
            return _command(line.strip(), chat, console)
        with Interrupt() as stop:
            chat.ask(line, lambda text: console.out(_harmless(text), end="", highlight=False), stop)
        console.print("\n[dim]stopped[/]" if stop.asked else "")
    except UserError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print("\nCtrl-D or /quit ends", style="dim")
    except torch.OutOfMemoryError as error:
        said = f"\nout of memory, all is read anew with the next turn: {reason(error)}"
        console.print(said, style="red", markup=False, highlight=False)
        chat.cache = chat.empty()
    except EOFError:
        console.print()
        return False
    return True


def main(name: str | None, options: ChatOptions, where: DeviceOptions) -> None:
    """Talk until the user ends it. Raises UserError, before weights are loaded where that is possible."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  editing and history of lines, where the system has it

    options.sampling()
    if where.threads is not None:
        torch.set_num_threads(where.threads)
    try:
        check_backend(options.backend)
    except ValueError as error:
        raise UserError(f"--backend: {error}") from error
    source = models.Source(name if name is not None else models.embedded()[-1])
    place = models.pick_device(where.device)
    number = models.pick_dtype(where.dtype, source, place)
    try:
        SinkCache(models.read_config(source), options.sinks, window(source.name, options))
    except ValueError as error:
        raise UserError(f"model {source.name!r} cannot chat: {reason(error)}") from error
    with patched(backend=options.backend) as now:
        if not now.active:
            raise UserError("HF_GDN_DISABLE is set, and a chat runs on patched models alone")
        loaded = models.load(source, place, number)
        patch(
            loaded.families, backend=options.backend, strict=True
        )  # which raises where transformers does not fit them
        layer_kernels(loaded.model)  # a backend that cannot serve says so before anything is typed
        if options.seed is not None:
            torch.manual_seed(options.seed)
        chat, console = Conversation(loaded, options), Console()
        sizes = f"{options.sinks} + {window(source.name, options):,} tokens kept"
        console.print(
            f"{source.label}, {loaded.dtype} on {place}, {sizes}; /help", style="bold", markup=False, highlight=False
        )
        if loaded.tokenizer.chat_template is None:
            console.print(
                "This model has no chat template: text goes in as it is, and is continued.", style="dim", soft_wrap=True
            )
        while _turn(chat, console):
            pass
