"""Switches in the environment, all of them read alike."""

from __future__ import annotations

import os

ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def switch(name: str, default: bool = False) -> bool:
    """Whether a switch is on. Without a value it has its default.

    Raises:
        ValueError: its value is none of `ON` and `OFF`, in lower case or upper case.

    Examples:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, HF_GDN_PATCH="off"):
        ...     switch("HF_GDN_PATCH", default=True)
        False
    """
    value = os.environ.get(name, "").strip().lower()
    if value and value not in ON + OFF:
        raise ValueError(f"{name} must be one of {', '.join(ON + OFF)}, got {os.environ[name]!r}")
    return value in ON if value else default
