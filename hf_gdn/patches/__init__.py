"""Patching transformers' layer classes, and undoing it.

`api` has what users call, `inspect` says what is patched, `family_patch` makes the swaps of one family, `swap` carries
them out. Every other module is a model family, or belongs to the forward that replaces the originals.
"""

from __future__ import annotations

from ..errors import PatchError
from .api import patch, patched, unpatch, unpatched
from .family import all_families
from .inspect import FamilyStatus, Status, families_in, layer_kernels, original_forward, status, unpatchable

__all__ = [
    "FamilyStatus",
    "PatchError",
    "Status",
    "all_families",
    "families_in",
    "layer_kernels",
    "original_forward",
    "patch",
    "patched",
    "status",
    "unpatch",
    "unpatchable",
    "unpatched",
]
