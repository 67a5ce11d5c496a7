"""Options as dataclasses: one definition serves Python callers, the command line and what a report says of its run.

A group is a frozen dataclass whose fields are made by `option`; `hf_gdn.cli.app.command` turns them into options of a
command. Fields made otherwise are for Python callers alone. Nothing here, and no module that defines groups, imports
torch: the command line reads them to print its help.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(
    default: Any, help: str, *, name: str | None = None, minimum: float | None = None, repeat: bool = False
) -> Any:
    """A field of a group.

    Args:
        default: the value without the option.
        help: what it does, a sentence.
        name: the option's name without dashes; the field's name by default.
        minimum: the smallest number taken.
        repeat: a tuple is given by repeating the option; otherwise by separating the values with commas.
    """
    return field(default=default, metadata={"help": help, "name": name, "minimum": minimum, "repeat": repeat})
