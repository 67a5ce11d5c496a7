"""The classes of cache layers that snapshots support: one entry of `KINDS` per class of transformers."""

from __future__ import annotations

from typing import Any

from ...errors import SnapshotError
from . import layers, sliding
from .layers import Kind

_KEYS = frozenset({"keys", "values"})
_SLIDING_KEYS = frozenset({"sliding_keys", "sliding_values"})
_INDEXED = "keys|values|indexer_keys|indexer_position_ids"


def _empty(layer: Any) -> Any:
    return type(layer)()


# Class name in transformers.cache_utils -> its kind.
KINDS: dict[str, Kind] = {
    "LinearAttentionLayer": Kind(
        "linear",
        r"(conv|recurrent)\.[0-9]{1,2}",
        frozenset(),
        layers.read_linear,
        layers.blank_linear,
        layers.prepare_linear,
    ),
    "DynamicLayer": Kind("attention", "keys|values", _KEYS, layers.read_growing, _empty, layers.prepare_growing),
    "StaticLayer": Kind(
        "attention", "keys|values", _KEYS, layers.read_static, layers.blank_static, layers.prepare_static
    ),
    "DynamicIndexedLayer": Kind("indexed", _INDEXED, _KEYS, layers.read_indexed, _empty, layers.prepare_indexed),
    "StaticIndexedLayer": Kind(
        "indexed", _INDEXED, _KEYS, layers.read_static_indexed, layers.blank_static, layers.prepare_static_indexed
    ),
    "DynamicSlidingWindowLayer": Kind(
        "sliding",
        "sliding_(keys|values)",
        _SLIDING_KEYS,
        sliding.read_growing,
        sliding.blank_growing,
        sliding.prepare_growing,
    ),
    "StaticSlidingWindowLayer": Kind(
        "sliding",
        "sliding_(keys|values)",
        _SLIDING_KEYS,
        sliding.read_static,
        sliding.blank_static,
        sliding.prepare_static,
    ),
}
BY_NAME = {kind.name: kind for kind in KINDS.values()}  # kinds of the same name allow and need the same parts


def kind_of(layer: Any, index: int) -> Kind:
    """The kind of a layer. Raises SnapshotError for an unknown class, including a subclass of a known one."""
    cls = type(layer)
    kind = KINDS.get(cls.__name__) if cls.__module__ == "transformers.cache_utils" else None
    if kind is None:
        raise SnapshotError(
            f"layer {index}: snapshots do not support a {cls.__name__}; supported: {', '.join(sorted(KINDS))}"
        )
    return kind
