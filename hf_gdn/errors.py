"""All exceptions of hf_gdn, and `reason`, which shortens an error to one line."""

from __future__ import annotations


class HfGdnError(Exception):
    """Base of the exceptions that hf_gdn defines."""


class PatchError(HfGdnError, RuntimeError):
    """The installed transformers lacks a version, class, argument or attribute that hf_gdn needs."""


class BackendError(HfGdnError, RuntimeError):
    """The named backend cannot serve the call, or no backend can."""


class BatchingError(HfGdnError, ValueError):
    """Continuous batching cannot serve a model or its settings; the text says why."""


class SnapshotError(HfGdnError, ValueError):
    """A snapshot, or a snapshot file, cannot be used; the text says what was expected and what was found."""


class RankFailure(HfGdnError, RuntimeError):
    """One of several processes failed; the text is its traceback."""


class UserError(HfGdnError):
    """An input of the user cannot be used; the text says what was expected and what was given."""


def named(error: Exception) -> str:
    """The type of an error and the `reason` for it, on one line."""
    return f"{type(error).__name__}: {reason(error)}"


def reason(error: Exception) -> str:
    """The reason for an error, on one line: the system's message for an OSError, else the first line of its text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    if isinstance(error, MemoryError) and not text:
        return "out of memory"
    if isinstance(error, KeyError):
        text = f"no {text}"
    first, *rest = (text or type(error).__name__).splitlines()
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first
