"""What is patched at the moment: one table, replaced as a whole and never changed in place."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .. import cuda_graphs
from .family_patch import FamilyPatch, cache_swaps
from .swap import Swap, move


@dataclass(frozen=True)
class Table:
    """What is in force.

    Attributes:
        patches: of the patched families, by name.
        misfits: families that `hf_gdn.patch` left original because transformers is not as they expect, and the reason.
    """

    patches: Mapping[str, FamilyPatch] = field(default_factory=dict)
    misfits: Mapping[str, str] = field(default_factory=dict)

    def swaps(self) -> list[Swap]:
        """All swaps. What caches gain comes with the first family."""
        swaps = (
            swap for change in self.patches.values() for swap in (change.layer, *change.others, change.decode_swap)
        )
        return [swap for swap in swaps if swap is not None] + (list(cache_swaps()) if self.patches else [])

    def without(self, name: str, misfit: str | None = None) -> Table:
        """The table without a family; `misfit` says why it cannot be patched, None when it was not asked for."""
        patches = {other: change for other, change in self.patches.items() if other != name}
        misfits = {other: why for other, why in self.misfits.items() if other != name}
        return Table(patches, misfits if misfit is None else {**misfits, name: misfit})


lock = threading.RLock()
_table = Table()


def current() -> Table:
    """The table in force."""
    return _table


def put(wanted: Table, instead_of: Table) -> None:
    """Put `wanted` in force in place of `instead_of`. It can be repeated after an interruption, either way."""
    global _table
    with lock:
        move(instead_of.swaps(), wanted.swaps())
        _table = wanted


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Put what is in force now back in force after the block, whatever is raised in it or on the way."""
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
