"""Write files atomically."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> Path:
    """Write a file atomically: call `write` with a temporary path beside `path`, fsync the result and rename it.

    A crash at any time leaves either the complete previous file or the complete new one. Symbolic links and permissions
    are preserved.

    Returns:
        The path of the file, with symbolic links resolved.

    Raises:
        OSError: the file cannot be written. Exceptions of `write` are propagated. The previous file is kept.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        beside.touch()
        mode = stat.S_IMODE((target if target.exists() else beside).stat().st_mode)
        write(beside)
        os.chmod(beside, mode)  # `write` may have replaced the file with one that only its owner can read
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
