"""Patching transformers' layer classes, and undoing it.

- `api` has the public functions, `inspect` reports what is patched, `in_force` stores it.
- `family_patch` builds the swaps of one family and `swap` applies them; `self_check` compares a patched layer with the
  original if transformers is newer than the tested range.
- `families/` has one file per model family.
- `forward` is the forward of patched layers. It calls `recording`, `padding` and `mixer`, each of which calls only
  those after it. `plan` chooses a layer's kernels. `text_model` is the forward of patched text models. `packing` reads
  the boundaries of packed sequences.
"""

from __future__ import annotations

from ..errors import PatchError
from .api import patch, patched, unpatch, unpatched
from .families import all_families
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
