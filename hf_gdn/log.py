"""The logger ``hf_gdn``, and warnings that are logged once."""

from __future__ import annotations

import logging

logger = logging.getLogger("hf_gdn")
warned: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning unless this process has already logged the same message with this function."""
    if message not in warned:
        warned.add(message)
        logger.warning(message)
