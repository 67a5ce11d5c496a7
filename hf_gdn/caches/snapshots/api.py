"""Take, restore and fork cache snapshots, so that a prefix is processed once and continued many times.

transformers can crop keys and values to an earlier length; a recurrent state cannot be cropped, it has to be kept. A
`Snapshot` is a copy of everything a cache holds, independent of the cache's class: what a DynamicCache held can be
restored into a StaticCache and the other way round.
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
from .fingerprint import differences, fingerprint, layer_devices
from .kinds import BY_NAME, kind_of
from .layers import Kind, Parts, check_parts, row_dimension


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a cache held at some time; shares no memory with it.

    Attributes:
        kinds: of every layer, a name of `hf_gdn.caches.snapshots.kinds.KINDS`.
        layers: of every layer, its parts by name.
        length: tokens read.
        model: `fingerprint` of the model whose cache it was, None when that was not told.
        checked: False when it was read from a file that names a model and nobody has said which one is used here.
    """

    kinds: tuple[str, ...]
    layers: tuple[Parts, ...]
    length: int
    model: str | None = None
    checked: bool = True

    @property
    def batch_size(self) -> int:
        """Sequences; 0 for a snapshot of an empty cache."""
        name, part = next(iter(self._parts()), ("", torch.empty(0)))
        return part.shape[row_dimension(name)] if part.dim() > row_dimension(name) else 0

    @property
    def dtype(self) -> torch.dtype | None:
        """Of keys and values; None without any."""
        return next((part.dtype for name, part in self._parts() if name == "keys"), None)

    @property
    def nbytes(self) -> int:
        """Memory that its tensors take."""
        return sum(part.nbytes for _, part in self._parts())

    def to(self, device: torch.device | str | int) -> Snapshot:
        """A copy on a device; what is there already is shared with this one."""
        return self._with(lambda _, part: part.to(device))

    def _parts(self) -> list[tuple[str, Tensor]]:
        return [item for parts in self.layers for item in parts.items()]

    def _with(self, change: Callable[[str, Tensor], Tensor], **values: Any) -> Snapshot:
        """This one with its parts changed one by one."""
        layers = tuple({name: change(name, part) for name, part in parts.items()} for parts in self.layers)
        return replace(self, layers=layers, **values)

    def __repr__(self) -> str:
        return (
            f"Snapshot({self.length} tokens, {self.batch_size} sequences, {len(self.layers)} layers, "
            f"{self.nbytes / 2**20:.1f} MiB, {self.model or 'model not told'})"
        )


def check(found: Snapshot) -> None:
    """Raise SnapshotError unless a snapshot can have been taken of a cache."""
    for index, (name, parts) in enumerate(zip(found.kinds, found.layers, strict=True)):
        if name not in BY_NAME:
            raise SnapshotError(f"layer {index} is of kind {name!r}; kinds: {', '.join(BY_NAME)}")
        check_parts(BY_NAME[name], parts, found.batch_size, found.length, index)


def read(cache: Cache) -> Snapshot:
    """A snapshot that shares its memory with the cache, to be copied from before the cache is used again."""
    kinds = _kinds(cache)
    layers = tuple(kind.read(layer) for kind, layer in zip(kinds, cache.layers))
    indexed = positions.first_indexed(cache)
    if indexed is not None and layers[indexed] and positions.NAME in vars(cache):
        layers[indexed]["indexer_position_ids"] = vars(cache)[positions.NAME]
    found = Snapshot(tuple(kind.name for kind in kinds), layers, int(cache.get_seq_length()))
    check(found)
    return found


def snapshot(cache: Cache, model: nn.Module | str | None = None) -> Snapshot:
    """Copy everything a cache holds, on the devices where it is.

    Args:
        cache: a DynamicCache or StaticCache that was made with a config, of any family of hf_gdn.
        model: the model that filled it, or its `fingerprint`: `restore` and `load` then refuse any other.

    Raises:
        SnapshotError: the cache has layers of a class that has no snapshots, or keeps some of them off its device.
        TypeError: not a cache of layers.

    Example:
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
    """Make a cache hold what it, or another one, held when a snapshot was taken. Going on from it gives the same bits.

    The cache may be empty or in use, and of the other class, static or dynamic: attention then sums in another order.
    Tensors that it has are written in place, but for keys that grow. Others are made where the model's layer runs;
    when the model is not given, where the snapshot's are. The snapshot can be used again.

    Args:
        model: the model that is to use the cache, or its `fingerprint`, which has to be the snapshot's. Needed for a
            snapshot from a file that names its model, unless `load` was told.

    Raises:
        SnapshotError: the snapshot is of another model or does not name its own, of other layers, shapes, dtypes or
            another batch size than the cache, or longer than a StaticCache has room for. The cache is then as it was.
        TypeError: not a cache of layers, or not a snapshot.

    Example:
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
    """`restore` without a look at the model: `devices` tells where the layers that are empty run."""
    kinds = tuple(kind.name for kind in _kinds(cache))
    if kinds != found.kinds:
        raise SnapshotError(
            f"the cache has layers {_count(kinds)}, the snapshot {_count(found.kinds)}, or in other order"
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
    with torch.inference_mode():  # caches filled in inference mode take no copies outside of it
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
    """Branch a cache: `n` caches that each go on from here, independent of one another and of this one.

    Args:
        rows: one cache instead, in which every sequence is there `n` times, one beside the other: what
            ``generate(num_return_sequences=n)`` and ``generate(num_beams=n)`` expect.

    Raises:
        SnapshotError: as for `snapshot`.
        ValueError: n is less than 1.

    Example:
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
    """An empty cache like another one."""
    new = copy.copy(cache)
    if positions.first_indexed(cache) is not None:
        vars(new).pop(positions.NAME, None)
    new.layers = [kind.blank(layer) for kind, layer in zip(_kinds(cache), cache.layers)]
    return new


def repeat(found: Snapshot, n: int) -> Snapshot:
    """A snapshot with every sequence `n` times."""
    return found._with(lambda name, part: part.repeat_interleave(n, dim=row_dimension(name)))


def check_model(found: Snapshot, model: nn.Module | str | None) -> None:
    """Raise SnapshotError when a snapshot is of another model, or nobody can tell."""
    if model is None and not found.checked:
        raise SnapshotError(
            f"the snapshot's file names its model, {found.model}: give the one that is used here, "
            "load(path, model) or restore(cache, snapshot, model)"
        )
    if model is None:
        return
    if found.model is None:
        raise SnapshotError("the snapshot does not name its model, as snapshot(cache, model) would have made it do")
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
        raise TypeError(f"expected a transformers cache of layers, got a {type(cache).__name__}")
    if getattr(cache, "offloading", False):
        raise SnapshotError("the cache keeps layers off their device (offloading=True), which snapshots cannot follow")
    return [kind_of(layer, index) for index, layer in enumerate(cache.layers)]


def _count(kinds: tuple[str, ...]) -> str:
    return ", ".join(f"{kinds.count(name)} {name}" for name in dict.fromkeys(kinds)) or "none"
