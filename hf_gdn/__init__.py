"""Fused kernels for the Gated DeltaNet and Kimi Delta Attention layers of Hugging Face transformers.

    import hf_gdn
    hf_gdn.patch()      # before or after from_pretrained

`patch`, `unpatch`, `patched`, `unpatched` and `status` switch them on and off; `hf_gdn.ops` has the functions alone,
`hf_gdn.registry` says which kernel serves what, `hf_gdn.caches` has snapshots of caches.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["caches", "ops", "patch", "patched", "status", "unpatch", "unpatched"]

logging.getLogger(__name__).setLevel(os.environ.get("HF_GDN_LOG", "WARNING").upper())

if TYPE_CHECKING:
    from . import caches, ops
    from .patches import patch, patched, status, unpatch, unpatched


def __getattr__(name: str) -> Any:
    # The face is put together on first use: importing hf_gdn costs next to nothing.
    if name in ("caches", "ops"):
        import importlib

        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        from . import patches

        return getattr(patches, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
