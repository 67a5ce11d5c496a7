"""Fix for transformers 5.17, which stores the positions of Qwen4-Exp's indexer on the cache instead of on its layers.

When tokens are rolled back or sequences selected, 5.17 updates the layers but not these positions. Rolling back then
gives wrong logits; selecting sequences gives an error in the next forward. Later versions keep them on the layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import PatchError
from . import seams

NAME = "position_ids"


@functools.cache
def on_cache() -> bool:
    """Whether the installed transformers keeps these positions on the cache."""
    try:
        return not hasattr(seams.cache_class("DynamicIndexedLayer")(), "indexer_position_ids")
    except PatchError:  # a transformers without indexers
        return False


def first_indexed(cache: Any) -> int | None:
    """Index of the cache's first indexed layer if the cache stores positions ``[3, B, T]``; else None."""
    if not on_cache():
        return None
    return next((index for index, layer in enumerate(cache.layers) if hasattr(layer, "indexer_keys")), None)


def _with_positions(
    change: Callable[[Any, Tensor, Any], Tensor],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a replacement for a method of Cache that also applies `change` to the positions on the cache."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            positions = vars(self).get(NAME)
            if positions is not None:
                setattr(self, NAME, change(self, positions, (*args, *kwargs.values())[0]))

        return method

    return make


def _rows(_: Any, positions: Tensor, rows: Tensor) -> Tensor:
    return positions[:, rows.to(positions.device)]


# Method of Cache -> function that makes its replacement from the original.
METHODS: dict[str, Callable[[Callable[..., None]], Callable[..., None]]] = {
    "crop": _with_positions(lambda cache, positions, _: positions[..., : cache.get_seq_length()]),
    "reorder_cache": _with_positions(_rows),
    "batch_select_indices": _with_positions(_rows),
    "batch_repeat_interleave": _with_positions(lambda _, positions, n: positions.repeat_interleave(n, dim=1)),
}
