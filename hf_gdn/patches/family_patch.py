"""Build the swaps that patch one model family, after checking the seams they rely on.

A family swaps the ``forward`` of its layers and of its text model, which passes packed sequences to the layers. If
the installed transformers allows tokens to be rolled back, it also enables assisted decoding in ``generate``. Any
patched family adds methods that caches of linear-attention layers lack (`cache_swaps`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..caches import rollback, row_methods
from ..drafting.candidates import make_get_candidate_generator
from ..drafting.continued import make_assisted_decoding, make_prepare_inputs
from ..errors import PatchError
from ..upstream import cache_names, indexer_positions, seams
from . import batching
from .families.base import MTP, Family
from .forward import make_forward
from .plan import Settings
from .swap import Swap, class_attribute
from .text_model import FirstRun, make_generate, make_model_forward


@dataclass(frozen=True)
class FamilyPatch:
    """The swaps of one family.

    Attributes:
        family, settings: the patched family and how it runs.
        layer: swap of the layers' ``forward``.
        others: all other swaps of the family.
        decode_swap: swap of ``get_compiled_call``, shared by all families that use CUDA graphs; None if this one does
            not.
    """

    family: Family
    settings: Settings
    layer: Swap
    others: tuple[Swap, ...]
    decode_swap: Swap | None = None


def _swap(cls: type, name: str, make: Callable[[Any], Any], current: FamilyPatch | None) -> Swap:
    """Swap a class attribute. If the current patch replaced it already, start from the original it kept."""
    value = class_attribute(cls, name)
    for swap in (current.layer, *current.others) if current is not None else ():
        if (swap.cls, swap.name) == (cls, name) and value is swap.replacement:
            value = swap.original
    return Swap(cls, name, value, make(value))


def layer_class(family: Family) -> Any:
    """Return the class of a family's layers. Raises PatchError if the class is missing or has other arguments."""
    try:
        return seams.layer_class(family.module, family.class_name)
    except PatchError as error:
        raise PatchError(f"{family.name}: {error}") from error


def build(
    family: Family, settings: Settings, current: FamilyPatch | None, first_run: Callable[[Swap], FirstRun | None]
) -> FamilyPatch:
    """Build the patch of a family.

    Args:
        family, settings: the family to patch and how it runs.
        current: the family's patch in force, or None.
        first_run: takes the swap of the layers' forward and returns the check to call when a text model runs, or None.

    Raises:
        PatchError: the family does not fit transformers; the text begins with the family's name.
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
            _swap(stateful, seams.CANDIDATES, make_get_candidate_generator(_why_no_mtp(family)), current),
            _swap(stateful, seams.ASSISTED, make_assisted_decoding, current),
        ]
    return FamilyPatch(family, settings, layer, tuple(others))


def _why_no_mtp(family: Family) -> str | None:
    reason = dict(family.cannot).get(MTP)
    return None if reason is None else f"{reason} ({family.name})"


def rollback_missing() -> str | None:
    """Why the installed transformers cannot roll back tokens, so ``generate`` refuses assistants; None if it can."""
    try:
        seams.check_rollback()
    except PatchError as error:
        return str(error)
    return None


@functools.cache
def cache_swaps() -> tuple[Swap, ...]:
    """The swaps in caches, ``generate`` and continuous batching that any patched family brings."""
    mixin, cache = seams.linear_cache_mixin(), seams.cache_class("Cache")
    methods: dict[str, Callable[[Any], Any]] = dict(row_methods.METHODS)
    of_caches: dict[str, Callable[[Any], Any]] = {}
    places: list[tuple[type, str, Callable[[Any], Any]]] = []
    if indexer_positions.on_cache():
        of_caches |= indexer_positions.METHODS
    if rollback_missing() is None:
        methods |= rollback.METHODS
        if isinstance(class_attribute(mixin, "is_compileable"), property):
            methods["is_compileable"] = rollback.make_is_compileable
        for name, make in rollback.CACHE_METHODS.items():
            inner = of_caches.get(name)
            of_caches[name] = make if inner is None else lambda value, make=make, inner=inner: make(inner(value))
        places.append((seams.generation_class(), seams.PREPARE, make_prepare_inputs))
    places += [(mixin, name, make) for name, make in methods.items()]
    places += [(cache, name, make) for name, make in of_caches.items()]
    if cache_names.name() != cache_names.NAMES[0]:
        places.append((seams.generation_class(), "generate", make_generate))
    return tuple(
        Swap(cls, name, class_attribute(cls, name), make(class_attribute(cls, name))) for cls, name, make in places
    ) + tuple(batching.swaps())
