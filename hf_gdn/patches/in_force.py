"""The table of current patches. It is replaced as a whole and never changed in place."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .. import cuda_graphs
from . import batching
from .family_patch import FamilyPatch, cache_swaps
from .swap import Swap, apply_swaps


@dataclass(frozen=True)
class Table:
    """The patches in force.

    Attributes:
        patches: patches by family name.
        misfits: families that `hf_gdn.patch` left original because they do not fit transformers, with the reason.
    """

    patches: Mapping[str, FamilyPatch] = field(default_factory=dict)
    misfits: Mapping[str, str] = field(default_factory=dict)

    def swaps(self) -> list[Swap]:
        """All swaps of the table, including those of caches if any family is patched."""
        swaps = (
            swap for change in self.patches.values() for swap in (change.layer, *change.others, change.decode_swap)
        )
        return [swap for swap in swaps if swap is not None] + (list(cache_swaps()) if self.patches else [])

    def without(self, name: str, misfit: str | None = None) -> Table:
        """The table without a family. `misfit` is why it cannot be patched; None if it is not meant to be."""
        patches = {other: change for other, change in self.patches.items() if other != name}
        misfits = {other: why for other, why in self.misfits.items() if other != name}
        return Table(patches, misfits if misfit is None else {**misfits, name: misfit})


lock = threading.RLock()
_table = Table()


def current() -> Table:
    """The table in force."""
    return _table


def put(wanted: Table, instead_of: Table) -> None:
    """Replace the patches `instead_of` with `wanted`. Idempotent; after an interruption, run it again or reversed."""
    global _table
    with lock:
        # Compared with what is in force, so that going back after an interruption is never refused.
        batching.leave(name for name, change in _table.patches.items() if wanted.patches.get(name) is not change)
        apply_swaps(instead_of.swaps(), wanted.swaps())
        _table = wanted


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Context manager that restores the current table on exit, whatever exception is raised."""
    before = _table
    try:
        yield
    finally:
        try:
            put(before, _table)
        except BaseException:
            put(before, _table)
            raise
        if all(change.decode_swap is None for change in _table.patches.values()):
            cuda_graphs.release()
