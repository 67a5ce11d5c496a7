"""The swaps that patch one model family, made from seams that have been checked.

A family swaps its layers' ``forward`` and its text model's, which tells the layers of packed sequences. Where
transformers lets tokens be rolled back, it also says so to ``generate``. With any family come methods that caches of
linear-attention layers lack (`cache_swaps`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..caches import rollback, row_methods
from ..drafting.prompt_lookup import make_get_candidate_generator
from ..errors import PatchError
from ..upstream import cache_names, indexer_positions, seams
from .families.base import Family
from .forward import make_forward
from .plan import Settings
from .swap import Swap, own
from .text_model import FirstRun, make_generate, make_model_forward


@dataclass(frozen=True)
class FamilyPatch:
    """The swaps of one family.

    Attributes:
        family, settings: what was patched, and how it runs.
        layer: of the layers' ``forward``.
        others: of everything else that the family swaps.
        decode_swap: of ``get_compiled_call``, the same for all families that have CUDA graphs; None without.
    """

    family: Family
    settings: Settings
    layer: Swap
    others: tuple[Swap, ...]
    decode_swap: Swap | None = None


def _swap(cls: type, name: str, make: Callable[[Any], Any], current: FamilyPatch | None) -> Swap:
    """The swap of a class's attribute, over the original that a patch in force has kept."""
    value = own(cls, name)
    for swap in (current.layer, *current.others) if current is not None else ():
        if (swap.cls, swap.name) == (cls, name) and value is swap.replacement:
            value = swap.original
    return Swap(cls, name, value, make(value))


def layer_class(family: Family) -> Any:
    """The class of a family's layers. Raises PatchError where transformers is not as expected."""
    try:
        return seams.layer_class(family.module, family.class_name)
    except PatchError as error:
        raise PatchError(f"{family.name}: {error}") from error


def build(
    family: Family, settings: Settings, current: FamilyPatch | None, first_run: Callable[[Swap], FirstRun | None]
) -> FamilyPatch:
    """The patch of a family.

    Args:
        family, settings: what to patch, and how it is to run.
        current: the family's patch that is in force, None without.
        first_run: makes, from the swap of the layers' forward, what is called when a text model first runs.

    Raises:
        PatchError: transformers is not as expected; the text begins with the family's name.
    """
    cls = layer_class(family)
    try:
        seams.check_linear_caches()
        seams.check_masks()
        model = seams.text_model_class(family.module, family.model_name)
        stateful = seams.stateful_class(model) if rollback_missing() is None else None
    except PatchError as error:
        raise PatchError(f"{family.name}: {error}") from error
    layer = _swap(cls, "forward", partial(make_forward, family, settings=settings), current)
    others = [_swap(model, "forward", partial(make_model_forward, first_run=first_run(layer)), current)]
    if stateful is not None:
        others += [
            _swap(stateful, seams.STATEFUL, lambda _: False, current),
            _swap(stateful, seams.CANDIDATES, make_get_candidate_generator, current),
        ]
    return FamilyPatch(family, settings, layer, tuple(others))


def rollback_missing() -> str | None:
    """Why tokens cannot be rolled back with the installed transformers, so that assistants are refused; None if not."""
    try:
        seams.check_rollback()
    except PatchError as error:
        return str(error)
    return None


@functools.cache
def cache_swaps() -> tuple[Swap, ...]:
    """What caches and ``generate`` gain with any patched family."""
    mixin, methods = seams.linear_cache_mixin(), dict(row_methods.METHODS)
    if rollback_missing() is None:
        methods |= rollback.METHODS
    places = [(mixin, name, make) for name, make in methods.items()]
    if indexer_positions.on_cache():
        places += [(seams.cache_class("Cache"), name, make) for name, make in indexer_positions.METHODS.items()]
    if cache_names.name() != cache_names.NAMES[0]:
        places.append((seams.generation_class(), "generate", make_generate))
    return tuple(Swap(cls, name, own(cls, name), make(own(cls, name))) for cls, name, make in places)
