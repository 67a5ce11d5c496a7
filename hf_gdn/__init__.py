"""Fused kernels for the Gated DeltaNet and Kimi Delta Attention layers of Hugging Face transformers.

    import hf_gdn
    hf_gdn.patch()      # before or after from_pretrained

`patch`, `unpatch`, `patched`, `unpatched` and `status` switch them on and off; `hf_gdn.ops` has the functions alone,
`hf_gdn.registry` says which kernel serves what, `hf_gdn.caches` has snapshots of caches, `hf_gdn.errors` the
exceptions.

Messages go to the logger ``hf_gdn``, whose level is the host program's; ``HF_GDN_LOG=INFO`` in the environment sets it.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "PatchError",
    "caches",
    "errors",
    "ops",
    "patch",
    "patched",
    "registry",
    "status",
    "unpatch",
    "unpatched",
]

if TYPE_CHECKING:
    from . import caches, errors, ops, registry
    from .errors import PatchError
    from .patches import patch, patched, status, unpatch, unpatched


def _set_level(name: str | None) -> None:
    """Set the logger's level as the environment says; an unknown name is reported and has no effect."""
    # No NullHandler: it would hide, in programs that configure no logging, the warning that slow kernels serve.
    logger = logging.getLogger(__name__)
    if not name:
        return
    if isinstance(logging.getLevelName(name.upper()), int):
        logger.setLevel(name.upper())
    else:
        logger.warning("HF_GDN_LOG=%s is no level; levels: DEBUG, INFO, WARNING, ERROR, CRITICAL", name)


_set_level(os.environ.get("HF_GDN_LOG"))


def __getattr__(name: str) -> Any:
    # The face is put together on first use: importing hf_gdn costs next to nothing.
    if name in ("caches", "errors", "ops", "registry"):
        return importlib.import_module(f".{name}", __name__)
    if name == "PatchError":
        return importlib.import_module(".errors", __name__).PatchError
    if name in __all__:
        try:
            return getattr(importlib.import_module(".patches", __name__), name)
        except ImportError:
            importlib.import_module(".upstream.versions", __name__).check()  # older versions lack what patches imports
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
