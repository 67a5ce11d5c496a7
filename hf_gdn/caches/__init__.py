"""Cache features that transformers lacks for hybrid models.

The public API is `SinkCache`, `PrefixCache`, `snapshot`, `restore`, `fork`, `save`, `load` and `fingerprint`, each
imported on first use. `row_methods` and `rollback` contain methods that `hf_gdn.patch()` adds to transformers' caches.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..errors import SnapshotError
    from .prefix import PrefixCache
    from .sinks import SinkCache
    from .snapshots import Snapshot, fork, restore, snapshot
    from .snapshots.files import load, save
    from .snapshots.fingerprint import fingerprint

_HOMES = {
    "SinkCache": "sinks",
    "snapshot": "snapshots",
    "restore": "snapshots",
    "fork": "snapshots",
    "save": "snapshots.files",
    "load": "snapshots.files",
    "PrefixCache": "prefix",
    "fingerprint": "snapshots.fingerprint",
    "Snapshot": "snapshots",
    "SnapshotError": "snapshots.layers",
}
__all__ = [
    "SinkCache",
    "snapshot",
    "restore",
    "fork",
    "save",
    "load",
    "PrefixCache",
    "fingerprint",
    "Snapshot",
    "SnapshotError",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
