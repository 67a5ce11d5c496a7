"""What caches of hybrid models lack in transformers, and what there is in a static one.

For users: `SinkCache`, `snapshot`, `restore`, `fork`, `save`, `load` and `PrefixCache`, each imported on first use.
What transformers' own caches gain under `hf_gdn.patch()` is in `batch` and `rewind`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..errors import SnapshotError
    from .identity import fingerprint
    from .prefix import PrefixCache
    from .sinks import SinkCache
    from .snapshot_files import load, save
    from .snapshots import Snapshot, fork, restore, snapshot

_HOMES = {
    "SinkCache": "sinks",
    "snapshot": "snapshots",
    "restore": "snapshots",
    "fork": "snapshots",
    "save": "snapshot_files",
    "load": "snapshot_files",
    "PrefixCache": "prefix",
    "fingerprint": "identity",
    "Snapshot": "snapshots",
    "SnapshotError": "snapshot_layers",
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
