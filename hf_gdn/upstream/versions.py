"""The supported, tested and installed versions of transformers."""

from __future__ import annotations

import transformers
from packaging.version import Version

from ..errors import PatchError

# The test suite runs on the oldest and the newest version, and on the last one before the cache argument was renamed.
OLDEST, NEWEST = "5.17", "5.24"
_BELOW = "6"
# Model types that were added after the oldest supported version.
FIRST = {"bailing_hybrid": "5.20", "lara_mini": "5.24"}


def version() -> str:
    """The version of the installed transformers."""
    return transformers.__version__


def installed() -> str:
    """Name and version of the installed transformers, for messages."""
    return f"transformers {version()}"


def _release() -> tuple[int, ...]:
    return Version(version()).release[:2]


def check() -> None:
    """Raise PatchError unless hf_gdn supports the installed transformers."""
    if not Version(OLDEST).release <= _release() < Version(_BELOW).release:
        raise PatchError(f"hf_gdn needs transformers >= {OLDEST} and < {_BELOW}; {installed()} is installed")


def is_tested() -> bool:
    """Whether the installed transformers is within the tested range."""
    return Version(OLDEST).release <= _release() <= Version(NEWEST).release


def since(family: str) -> str:
    """The first supported version that has a model type."""
    return FIRST.get(family, OLDEST)
