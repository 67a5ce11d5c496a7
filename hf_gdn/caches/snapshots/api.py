"""Take, restore and fork cache snapshots, so that a prefix is processed once and continued many times.

transformers can crop keys and values to an earlier length, but a recurrent state cannot be cropped, so it has to be
copied. A `Snapshot` is a copy of everything a cache holds. It does not depend on the cache's class: a snapshot of a
DynamicCache can be restored into a StaticCache and vice versa.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from transformers import Cache

from ...errors import SnapshotError
from ...upstream import indexer_positions as positions
from .. import rollback
from .fingerprint import differences, fingerprint, layer_devices
from .kinds import BY_NAME, kind_of
from .layers import Kind, Parts, check_parts, row_dimension


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy of the contents of a cache; shares no memory with it.

    Attributes:
        kinds: name of the kind of each layer (`hf_gdn.caches.snapshots.kinds`).
        layers: parts of each layer by name.
        length: number of tokens.
        model: `fingerprint` of the model that filled the cache, None if unknown.
        checked: False if it was loaded from a file that names a model, and has not been compared with the model in use.
    """

    kinds: tuple[str, ...]
    layers: tuple[Parts, ...]
    length: int
    model: str | None = None
    checked: bool = True

    @property
    def batch_size(self) -> int:
        """Number of sequences; 0 for a snapshot of an empty cache."""
        name, part = next(iter(self._parts()), ("", torch.empty(0)))
        return part.shape[row_dimension(name)] if part.dim() > row_dimension(name) else 0

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of keys and values; None if there are none."""
        return next((part.dtype for name, part in self._parts() if name == "keys"), None)

    @property
    def nbytes(self) -> int:
        """Memory of its tensors in bytes."""
        return sum(part.nbytes for _, part in self._parts())

    def to(self, device: torch.device | str | int) -> Snapshot:
        """Return the snapshot on a device; tensors that are already there are shared, not copied."""
        return self._with(lambda _, part: part.to(device))

    def _parts(self) -> list[tuple[str, Tensor]]:
        return [item for parts in self.layers for item in parts.items()]

    def _with(self, change: Callable[[str, Tensor], Tensor], **values: Any) -> Snapshot:
        """A snapshot in which every part is replaced by ``change(name, part)``."""
        layers = tuple({name: change(name, part) for name, part in parts.items()} for parts in self.layers)
        return replace(self, layers=layers, **values)

    def __repr__(self) -> str:
        return (
            f"Snapshot({self.length} tokens, {self.batch_size} sequences, {len(self.layers)} layers, "
            f"{self.nbytes / 2**20:.1f} MiB, {self.model or 'model not told'})"
        )


def check(found: Snapshot) -> None:
    """Raise SnapshotError unless the parts of a snapshot are consistent."""
    for index, (name, parts) in enumerate(zip(found.kinds, found.layers, strict=True)):
        if name not in BY_NAME:
            raise SnapshotError(f"layer {index} is of kind {name!r}; kinds: {', '.join(BY_NAME)}")
        check_parts(BY_NAME[name], parts, found.batch_size, found.length, index)


def read(cache: Cache) -> Snapshot:
    """Return a snapshot that shares memory with the cache. Copy it before the cache is used again."""
    kinds = _kinds(cache)
    try:
        rollback.check_cache(cache)
    except RuntimeError as error:
        raise SnapshotError(str(error)) from None
    layers = tuple(kind.read(layer) for kind, layer in zip(kinds, cache.layers))
    indexed = positions.first_indexed(cache)
    if indexed is not None and layers[indexed] and positions.NAME in vars(cache):
        layers[indexed]["indexer_position_ids"] = vars(cache)[positions.NAME]
    found = Snapshot(tuple(kind.name for kind in kinds), layers, int(cache.get_seq_length()))
    check(found)
    return found


def snapshot(cache: Cache, model: nn.Module | str | None = None) -> Snapshot:
    """Copy everything a cache holds, on the same devices.

    Args:
        cache: a DynamicCache or StaticCache that was made with a config, of any family of hf_gdn.
        model: the model that filled it, or its `fingerprint`; `restore` and `load` then refuse any other model.

    Raises:
        SnapshotError: a layer is of a class that snapshots do not support, or the cache offloads layers.
        TypeError: not a cache with layers.

    Examples:
        >>> from transformers import DynamicCache
        >>> from hf_gdn.caches import restore, snapshot
        >>> cache = DynamicCache(config=model.config)
        >>> _ = model(**inputs, cache=cache)
        >>> kept = snapshot(cache, model)
        >>> kept.length, kept.batch_size
        (8, 1)
        >>> _ = model(inputs["input_ids"], cache=cache)
        >>> restore(cache, kept, model)
        >>> cache.get_seq_length()
        8
    """
    with torch.no_grad():
        return read(cache)._with(lambda _, part: own(part), model=_name(model))


def restore(cache: Cache, snapshot: Snapshot, model: nn.Module | str | None = None) -> None:
    """Restore a snapshot into the cache it was taken of, or into another one. Continuing from it gives the same bits.

    The cache may be empty or in use. If one cache is static and the other dynamic, attention sums in another order.
    Existing tensors are written in place, except keys and values that grow. New tensors are made on the device of the
    model's layer or, if `model` is not given, on the device of the snapshot. The snapshot can be used again.

    Args:
        model: the model that uses the cache, or its `fingerprint`, to compare with the snapshot's model. Required for
            a snapshot loaded from a file that names its model, unless `load` was given it.

    Raises:
        SnapshotError: the snapshot is of another model or names none, its layers, shapes, dtypes or batch size differ
            from the cache's, or it is longer than a StaticCache. The cache is unchanged.
        TypeError: not a cache with layers, or not a snapshot.

    Examples:
        >>> from transformers import DynamicCache, StaticCache
        >>> from hf_gdn.caches import restore, snapshot
        >>> cache = DynamicCache(config=model.config)
        >>> _ = model(**inputs, cache=cache)
        >>> static = StaticCache(config=model.config, max_cache_len=32)
        >>> restore(static, snapshot(cache, model), model)
        >>> int(static.get_seq_length())
        8
    """
    if not isinstance(snapshot, Snapshot):
        raise TypeError(f"restore needs a Snapshot, got a {type(snapshot).__name__}; load(path) reads one from a file")
    check_model(snapshot, model)
    devices = None
    if isinstance(model, nn.Module):
        devices = layer_devices(model, len(snapshot.layers))
    put(cache, snapshot, devices)


def put(cache: Cache, found: Snapshot, devices: list[torch.device | None] | None = None) -> None:
    """`restore` without comparing models. `devices`: the device of each layer, for layers that are empty."""
    kinds = tuple(kind.name for kind in _kinds(cache))
    if kinds != found.kinds:
        raise SnapshotError(
            f"the cache has layers {_count(kinds)}, the snapshot {_count(found.kinds)}; kinds or order differ"
        )
    check(found)
    commits = []
    for index, (layer, parts) in enumerate(zip(cache.layers, found.layers)):
        try:
            with torch.no_grad():
                device = devices[index] if devices else None
                commits.append(kind_of(layer, index).prepare(layer, parts, device, found.length))
        except SnapshotError as error:
            raise SnapshotError(f"layer {index}: {error}; nothing was restored") from None
    indexed, placed = positions.first_indexed(cache), None
    if indexed is not None and "indexer_position_ids" in found.layers[indexed]:
        placed = found.layers[indexed]["indexer_position_ids"].to(devices[indexed] if devices else None, copy=True)
    with torch.inference_mode():  # tensors made in inference mode can be written only in inference mode
        for commit in commits:
            commit()
    if indexed is not None:
        vars(cache).pop(positions.NAME, None)
        if placed is not None:
            setattr(cache, positions.NAME, placed)


@overload
def fork(cache: Cache, n: int, *, rows: Literal[False] = False) -> list[Cache]: ...


@overload
def fork(cache: Cache, n: int, *, rows: Literal[True]) -> Cache: ...


def fork(cache: Cache, n: int, *, rows: bool = False) -> list[Cache] | Cache:
    """Make `n` independent copies of a cache, to continue in different ways.

    Args:
        rows: return one cache in which every sequence is repeated `n` times, copies adjacent, as expected by
            ``generate(num_return_sequences=n)`` and ``generate(num_beams=n)``.

    Raises:
        SnapshotError: as for `snapshot`.
        ValueError: n is less than 1.

    Examples:
        >>> from transformers import DynamicCache
        >>> from hf_gdn.caches import fork
        >>> cache = DynamicCache(config=model.config)
        >>> _ = model(**inputs, cache=cache)
        >>> one, other = fork(cache, 2)
        >>> _ = model(inputs["input_ids"], cache=one)
        >>> one.get_seq_length(), other.get_seq_length()
        (16, 8)
    """
    if n < 1:
        raise ValueError(f"fork needs n ≥ 1, got {n}")
    with torch.no_grad():
        found = read(cache)
        if rows:
            branch = blank(cache)
            put(branch, repeat(found, n))
            return branch
    branches = []
    for _ in range(n):
        branches.append(blank(cache))
        put(branches[-1], found)
    return branches


def blank(cache: Cache) -> Cache:
    """An empty cache of the same class and sizes."""
    new = copy.copy(cache)
    if positions.first_indexed(cache) is not None:
        vars(new).pop(positions.NAME, None)
    new.layers = [kind.blank(layer) for kind, layer in zip(_kinds(cache), cache.layers)]
    return new


def repeat(found: Snapshot, n: int) -> Snapshot:
    """A snapshot with every sequence repeated `n` times."""
    return found._with(lambda name, part: part.repeat_interleave(n, dim=row_dimension(name)))


def check_model(found: Snapshot, model: nn.Module | str | None) -> None:
    """Raise SnapshotError if a snapshot is of another model, or its model must be compared and is unknown."""
    if model is None and not found.checked:
        raise SnapshotError(
            f"the snapshot's file names its model, {found.model}: pass the model in use, "
            "load(path, model) or restore(cache, snapshot, model)"
        )
    if model is None:
        return
    if found.model is None:
        raise SnapshotError("the snapshot does not name its model; take it with snapshot(cache, model)")
    name = _name(model) or ""
    if name != found.model:
        raise SnapshotError(
            f"the snapshot is of another model: {differences(found.model, name)} ({found.model}, here {name})"
        )


def _name(model: nn.Module | str | None) -> str | None:
    return fingerprint(model) if isinstance(model, nn.Module) else model


def own(part: Tensor) -> Tensor:
    """A contiguous copy without gradients."""
    return part.detach().clone(memory_format=torch.contiguous_format)


def _kinds(cache: Cache) -> list[Kind]:
    if not isinstance(cache, Cache) or not isinstance(getattr(cache, "layers", None), list):
        raise TypeError(f"expected a transformers cache with layers, got a {type(cache).__name__}")
    if getattr(cache, "offloading", False):
        raise SnapshotError("the cache offloads its layers (offloading=True), which snapshots do not support")
    return [kind_of(layer, index) for index, layer in enumerate(cache.layers)]


def _count(kinds: tuple[str, ...]) -> str:
    return ", ".join(f"{kinds.count(name)} {name}" for name in dict.fromkeys(kinds)) or "none"
