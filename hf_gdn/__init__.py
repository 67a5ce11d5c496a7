"""Fused kernels for the Gated DeltaNet and Kimi Delta Attention layers of Hugging Face transformers.

    import hf_gdn
    hf_gdn.patch()      # before or after from_pretrained

- `patch`, `unpatch`, `patched`, `unpatched`, `status`: turn the kernels on and off.
- `hf_gdn.ops`: the functional API.
- `kernel_mapping`: the same through Hugging Face's ``kernels`` package.
- `hf_gdn.registry`: which kernels exist and which one serves a call.
- `hf_gdn.caches`: snapshots, prefix caching and attention sinks.
- `hf_gdn.errors`: all exceptions.

Messages go to the logger ``hf_gdn``. The host program sets its level, or the environment: ``HF_GDN_LOG=INFO``.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

from .environment import switch as _switch

__version__ = "0.1.0"
__all__ = [
    "PatchError",
    "caches",
    "errors",
    "kernel_mapping",
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
    from .hub_kernels import kernel_mapping
    from .patches import patch, patched, status, unpatch, unpatched


def _set_level(name: str | None) -> None:
    """Set the logger's level from the environment. An unknown level is reported and has no effect."""
    # No NullHandler: in programs that do not configure logging, it would hide the warning about slow kernels.
    logger = logging.getLogger(__name__)
    if not name:
        return
    if isinstance(logging.getLevelName(name.upper()), int):
        logger.setLevel(name.upper())
    else:
        logger.warning("HF_GDN_LOG=%s is not a log level; levels: DEBUG, INFO, WARNING, ERROR, CRITICAL", name)


_set_level(os.environ.get("HF_GDN_LOG"))


def __getattr__(name: str) -> Any:
    # Submodules are imported on first use, so that importing hf_gdn is fast.
    if name in ("caches", "errors", "ops", "registry"):
        return importlib.import_module(f".{name}", __name__)
    if name == "PatchError":
        return importlib.import_module(".errors", __name__).PatchError
    if name == "kernel_mapping":
        return importlib.import_module(".hub_kernels", __name__).kernel_mapping
    if name in __all__:
        try:
            return getattr(importlib.import_module(".patches", __name__), name)
        except ImportError:
            # The import fails with unsupported versions of transformers; this check says so.
            importlib.import_module(".upstream.versions", __name__).check()
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


if _switch("HF_GDN_PATCH"):
    importlib.import_module(".patches", __name__).patch()
