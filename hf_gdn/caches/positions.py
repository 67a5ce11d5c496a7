"""Positions that transformers 5.17 keeps on a cache itself: Qwen4-Exp's indexer reads those of all its tokens.

5.17 changes the layers when tokens are taken back or sequences selected and leaves these positions as they were: wrong
logits after the one, an error in the next forward after the other. Later versions keep them on the layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicIndexedLayer

NAME = "position_ids"
_ON_CACHE = not hasattr(DynamicIndexedLayer(), "indexer_position_ids")


def first_indexed(cache: Cache) -> int | None:
    """The cache's first indexed layer, where transformers keeps its positions ``[3, B, T]`` on the cache."""
    if not _ON_CACHE:
        return None
    return next((index for index, layer in enumerate(cache.layers) if hasattr(layer, "indexer_keys")), None)


def _with_positions(name: str, change: Callable[[Cache, Tensor, Any], Tensor]) -> Callable[..., None]:
    """Cache's method, after which the positions on the cache are changed as well."""
    original = getattr(Cache, name)

    @functools.wraps(original)
    def method(self: Cache, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        positions = vars(self).get(NAME)
        if positions is not None:
            setattr(self, NAME, change(self, positions, (*args, *kwargs.values())[0]))

    return method


def _rows(_: Cache, positions: Tensor, rows: Tensor) -> Tensor:
    return positions[:, rows.to(positions.device)]


METHODS = (
    (
        _with_positions("crop", lambda cache, positions, _: positions[..., : cache.get_seq_length()]),
        _with_positions("reorder_cache", _rows),
        _with_positions("batch_select_indices", _rows),
        _with_positions("batch_repeat_interleave", lambda _, positions, n: positions.repeat_interleave(n, dim=1)),
    )
    if _ON_CACHE
    else ()
)
