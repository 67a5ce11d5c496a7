"""The folder for what is made once per machine, such as compiled CPU kernels."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """``HF_GDN_CACHE``, else ``hf_gdn`` in the user's cache folder.

    Raises:
        ImportError: the environment does not name a folder, and platformdirs, which knows the user's, is not installed.
    """
    if os.environ.get("HF_GDN_CACHE"):
        return Path(os.environ["HF_GDN_CACHE"])
    import platformdirs

    return Path(platformdirs.user_cache_dir("hf_gdn", appauthor=False))


def make_writable(folder: Path) -> None:
    """Create a folder unless it exists. Raises OSError if files cannot be written to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
