"""The logger ``hf_gdn``, and warnings that are given once."""

from __future__ import annotations

import logging

logger = logging.getLogger("hf_gdn")
warned: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning the first time it is given in this process."""
    if message not in warned:
        warned.add(message)
        logger.warning(message)
