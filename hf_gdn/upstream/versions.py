"""Which versions of transformers are supported, tested and installed."""

from __future__ import annotations

import transformers
from packaging.version import Version

from ..errors import PatchError

# The suite runs on the oldest, on the newest, and on the last version before caches were renamed.
OLDEST, NEWEST = "5.17", "5.24"
_BELOW = "6"
# Model types that were added after the oldest supported version.
FIRST = {"bailing_hybrid": "5.20", "lara_mini": "5.24"}


def version() -> str:
    """The version of the installed transformers."""
    return transformers.__version__


def installed() -> str:
    """The installed transformers, as messages name it."""
    return f"transformers {version()}"


def _release() -> tuple[int, ...]:
    return Version(version()).release[:2]


def check() -> None:
    """Raise PatchError unless the installed transformers is one that hf_gdn can patch."""
    if not Version(OLDEST).release <= _release() < Version(_BELOW).release:
        raise PatchError(f"hf_gdn needs transformers >= {OLDEST} and < {_BELOW}; {installed()} is installed")


def is_tested() -> bool:
    """Whether the installed transformers is within the range that the test suite runs on."""
    return Version(OLDEST).release <= _release() <= Version(NEWEST).release


def since(family: str) -> str:
    """The first supported version that has a model type."""
    return FIRST.get(family, OLDEST)
