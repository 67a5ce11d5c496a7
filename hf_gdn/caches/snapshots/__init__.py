"""Snapshots of caches: `api` takes and restores them, `files` saves and loads them, `kinds` lists the cache layers."""

from .api import Snapshot, fork, read, restore, snapshot

__all__ = ["Snapshot", "fork", "read", "restore", "snapshot"]
