"""The folder in which hf_gdn keeps what it may lose: verdicts about kernels, compiled CPU kernels."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """The user's cache folder for hf_gdn, or the one that the environment's HF_GDN_CACHE names. It may not exist.

    Examples:
        >>> import os
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, HF_GDN_CACHE="/tmp/elsewhere"):
        ...     str(cache_folder())
        '/tmp/elsewhere'
    """
    named = os.environ.get("HF_GDN_CACHE")
    return Path(named).expanduser() if named else user_cache_path("hf_gdn", appauthor=False)


def make_writable(folder: Path) -> None:
    """Create a folder unless it exists. Raises OSError if files cannot be written to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
