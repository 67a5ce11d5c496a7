"""Files that are whole at any time."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> Path:
    """Call `write` with the name of a file beside `path`, bring that to the disk and move it there.

    A crash at any time leaves the previous file or the new one, whole. Links and permissions stay as they are.

    Returns:
        The file's own path.

    Raises:
        OSError: the file cannot be written. What `write` raises is passed on. What was there before still is.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        beside.touch()
        mode = stat.S_IMODE((target if target.exists() else beside).stat().st_mode)
        write(beside)
        os.chmod(beside, mode)  # a writer's own may let nobody else read
        _to_disk(beside)
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    if os.name == "posix":
        _to_disk(target.parent)
    return target


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
