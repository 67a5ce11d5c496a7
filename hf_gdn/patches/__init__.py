"""Patching transformers' layer classes, and undoing it.

- `api` has what users call, `inspect` says what is patched, `in_force` holds it.
- `family_patch` makes the swaps of one family and `swap` carries them out; `self_check` compares a layer with the
  original where transformers is newer than the tested range.
- `families/` has one file a model family.
- `forward` is the forward of patched layers. Below it are `recording`, `padding` and `mixer`, each calling only those
  after it, and `plan`, which kernels a layer runs on. `text_model` is the forward of patched text models, `packing`
  reads the bounds of packed sequences.
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
