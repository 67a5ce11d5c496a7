"""Text for the quality checks, taken from the Python standard library.

Every Python installation carries a few megabytes of freely usable source
code, so the checks need neither a download nor a bundled corpus.  Most of the
files train the tiny models in ``assets``; the modules named in
:data:`HELD_OUT` are never trained on and measure perplexity.
"""

import sysconfig
from pathlib import Path

#: Files kept out of training, one from each of many corners of the library, so that they are a fair sample of it.
HELD_OUT: tuple[str, ...] = (
    "asyncio/streams.py",
    "concurrent/futures/thread.py",
    "configparser.py",
    "ctypes/util.py",
    "email/message.py",
    "heapq.py",
    "http/cookiejar.py",
    "logging/handlers.py",
    "multiprocessing/pool.py",
    "shelve.py",
    "socketserver.py",
    "tarfile.py",
    "textwrap.py",
    "unittest/case.py",
    "urllib/request.py",
    "xml/dom/minidom.py",
)

# Directories left out of training at any depth: third-party code, test suites,
# bundled tools, and tables written by a program.
_SKIPPED_DIRECTORIES = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}

# Single files left out: tables, and local additions to an installation.
_SKIPPED_FILES = {
    "html/entities.py",
    "sitecustomize.py",
    "stringprep.py",
    "usercustomize.py",
}

# Start of a file or directory name that marks build data of one machine.
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-")


def _stdlib() -> Path:
    """Return the directory of the standard library's Python sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def _is_training_file(relative: Path) -> bool:
    """Tell whether a source file, given relative to the library, is trained on."""
    parts = relative.parts
    if relative.as_posix() in HELD_OUT:
        return False
    if _SKIPPED_DIRECTORIES.intersection(parts) or relative.as_posix() in _SKIPPED_FILES:
        return False
    return not any(part.startswith(_SKIPPED_PREFIXES) for part in parts)


def _read(path: Path) -> str:
    """Read a source file, replacing what is not valid UTF-8."""
    return path.read_text(encoding="utf-8", errors="replace")


def stdlib_files() -> list[Path]:
    """Return the training files, sorted by their path inside the library.

    The modules of :data:`HELD_OUT`, test suites, generated tables, installed
    packages and anything specific to one machine are not among them.
    """
    root = _stdlib()
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(relative, key=Path.as_posix) if _is_training_file(path)]


def held_out_text() -> str:
    """Return the sources of the :data:`HELD_OUT` files, joined in that order.

    A file that this Python does not have is left out.
    """
    texts = [_read(path) for path in (_stdlib() / name for name in HELD_OUT) if path.is_file()]
    if not texts:
        raise FileNotFoundError(f"no standard library sources under {_stdlib()}")
    return "\n".join(texts)
