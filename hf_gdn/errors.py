"""Errors that a command prints as one line."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave cannot be used; the text says what was expected and what came."""
