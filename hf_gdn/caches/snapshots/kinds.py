"""Which classes of cache layers have snapshots. A class of transformers' cache layers is one entry of `KINDS`."""

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


# Name of a class of transformers.cache_utils -> its kind.
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
BY_NAME = {kind.name: kind for kind in KINDS.values()}  # of the same name, any: checks of parts are the same


def kind_of(layer: Any, index: int) -> Kind:
    """The kind of a layer. Raises SnapshotError for an unknown class, including a subclass of a known one."""
    cls = type(layer)
    kind = KINDS.get(cls.__name__) if cls.__module__ == "transformers.cache_utils" else None
    if kind is None:
        raise SnapshotError(
            f"layer {index}: a {cls.__name__} has no snapshots; those that have: {', '.join(sorted(KINDS))}"
        )
    return kind
