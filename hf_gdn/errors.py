"""Exceptions, and how a command words an error on one line."""

from __future__ import annotations


class HfGdnError(Exception):
    """Base of the exceptions that hf_gdn defines."""


class PatchError(HfGdnError, RuntimeError):
    """The installed transformers does not look as hf_gdn expects: a version, a class, an argument or an attribute."""


class BackendError(HfGdnError, RuntimeError):
    """A backend was asked for by name and cannot serve the call, or no backend can."""


class SnapshotError(HfGdnError, ValueError):
    """A snapshot, or a file said to hold one, cannot be used here; the text says what was expected and what came."""


class RankFailure(HfGdnError, RuntimeError):
    """A process of several failed; the text is its traceback."""


class UserError(HfGdnError):
    """Something the user gave cannot be used; the text says what was expected and what came."""


def reason(error: Exception) -> str:
    """Why an operation failed, on one line: the system's words for an OSError, else the text's first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
