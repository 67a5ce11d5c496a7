"""Snapshots of caches: `api` takes and restores them, `files` saves them, the rest knows each kind of cache layer."""

from .api import Snapshot, fork, read, restore, snapshot

__all__ = ["Snapshot", "fork", "read", "restore", "snapshot"]
