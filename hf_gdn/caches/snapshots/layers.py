"""Read and restore each class of cache layers; `kinds` has the table of classes.

Parts of a layer, by name:

- linear layers: ``conv.<i>`` ``[B, C, width]`` (of token ids: ``[B, width]``) and ``recurrent.<i>`` ``[B, HV, K, V]``;
- attention layers: ``keys`` and ``values`` ``[B, H, T, D]``;
- with an indexer, also ``indexer_keys`` ``[B, T, D]`` and ``indexer_position_ids`` ``[P, B, T]``;
- sliding-window layers: ``sliding_keys`` and ``sliding_values`` ``[B, H, min(T, window - 1), D]``.

Growing and static layers have the same parts, so a snapshot of one can be restored into the other.

Restoring has two phases. `Kind.prepare` does all checks and allocations. The function it returns is called when all
layers are prepared; it only copies and assigns, so it does not fail. Existing tensors are written in place, except keys
and values that grow, so that the addresses that compiled code and CUDA graphs hold stay valid.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import SnapshotError

Parts = dict[str, Tensor]
Commit = Callable[[], None]
GROWING = {"keys": 2, "values": 2, "indexer_keys": 1, "indexer_position_ids": 2}  # part -> its dimension of tokens
DIMENSIONS = {
    "keys": 4,
    "values": 4,
    "indexer_keys": 3,
    "indexer_position_ids": 3,
    "sliding_keys": 4,
    "sliding_values": 4,
}


def row_dimension(name: str) -> int:
    """The batch dimension of a part."""
    return 1 if name == "indexer_position_ids" else 0


@dataclass(frozen=True)
class Kind:
    """How layers of a class are read and restored.

    Attributes:
        name: its name in files.
        allowed: regular expression for the names of its parts.
        needed: parts that must be present if any part is.
        read: layer -> its parts, views of its tensors if possible; no parts if it is empty.
        blank: layer -> an empty layer of the same class and size.
        prepare: layer, parts, device for new tensors (None: the parts' device), number of tokens -> the second phase.
    """

    name: str
    allowed: str
    needed: frozenset[str]
    read: Callable[[Any], Parts]
    blank: Callable[[Any], Any]
    prepare: Callable[[Any, Parts, torch.device | None, int], Commit]


def check_parts(kind: Kind, parts: Parts, rows: int, length: int, index: int) -> None:
    """Raise SnapshotError unless the parts are valid for a layer of `kind` with `rows` sequences of `length` tokens."""
    here = f"layer {index} ({kind.name})"
    strange = [name for name in parts if not re.fullmatch(kind.allowed, name)]
    missing = kind.needed - set(parts) if parts else ()
    if strange or missing:
        raise SnapshotError(f"{here}: has parts {sorted(parts)}, expected {kind.allowed}")
    for name, part in parts.items():
        fits = part.dim() == DIMENSIONS[name] if name in DIMENSIONS else part.dim() >= 2
        fits = fits and part.shape[row_dimension(name)] == rows
        if not fits or (name in GROWING and part.shape[GROWING[name]] != length):
            raise SnapshotError(f"{here}: {name} is {list(part.shape)} for {rows} sequences of {length} tokens")
    for keys, values in (("keys", "values"), ("sliding_keys", "sliding_values")):
        if keys in parts and parts[keys].shape[1] != parts[values].shape[1]:
            raise SnapshotError(f"{here}: keys have {parts[keys].shape[1]} heads, values {parts[values].shape[1]}")


def fits(name: str, held: Tensor, part: Tensor, free: int | None = None) -> None:
    """Raise SnapshotError unless a part has the dtype and shape of `held`; sizes of dimension `free` may differ."""
    wanted, came = list(held.shape), list(part.shape)
    row = row_dimension(name)
    if len(wanted) == len(came) and wanted[row] != came[row]:
        raise SnapshotError(f"the cache holds {wanted[row]} sequences, the snapshot {came[row]}")
    if free is not None and len(wanted) == len(came):
        wanted[free] = came[free]
    if wanted != came or held.dtype != part.dtype:
        raise SnapshotError(f"{name}: the cache holds {wanted} of {held.dtype}, the snapshot {came} of {part.dtype}")


class Change:
    """The prepared change of a layer: new values of its attributes, and copies into existing tensors. Call it to apply.

    Attributes:
        layer, new: the layer, and a shallow copy whose attributes it will get.
        copies: pairs of an existing tensor and its new contents; None for zeros.
        stale: attributes to delete.
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.new = layer, copy.copy(layer)
        self.copies: list[tuple[Tensor, Tensor | None]] = []
        self.stale: list[str] = []
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                setattr(self.new, name, dict(value))

    def __call__(self) -> None:
        for held, part in self.copies:
            held.zero_() if part is None else held.copy_(part)
        for name, value in vars(self.new).items():
            if isinstance(value, dict):
                getattr(self.layer, name).update(value)
            else:
                setattr(self.layer, name, value)
        for name in self.stale:
            vars(self.layer).pop(name, None)


# --------------------------------------------------------------------------------------------------------------- linear


def _states(layer: Any) -> tuple[tuple[str, dict[int, Any], dict[int, bool]], ...]:
    return (
        ("conv", layer.conv_states, layer.is_conv_states_initialized),
        ("recurrent", layer.recurrent_states, layer.is_recurrent_states_initialized),
    )


def _window(layer: Any, index: int) -> Tensor:
    """The last columns of a convolution state. While transformers records the past, it may hold more or fewer."""
    held, width = layer.conv_states[index], layer.conv_kernel_size[index]
    return F.pad(held[..., -width:], (max(0, width - held.shape[-1]), 0))


def read_linear(layer: Any) -> Parts:
    parts = {}
    for name, states, ready in _states(layer):
        for i in range(layer.number_of_states):
            if ready[i] and layer.has_previous_state[i]:
                parts[f"{name}.{i}"] = _window(layer, i) if name == "conv" else states[i]
    return parts


def blank_linear(layer: Any) -> Any:
    blank = type(layer)(number_of_states=layer.number_of_states)
    blank.record_past = layer.record_past
    return blank


def prepare_linear(layer: Any, parts: Parts, device: torch.device | None, length: int) -> Commit:
    beyond = [name for name in parts if int(name.rpartition(".")[2]) >= layer.number_of_states]
    if beyond:
        raise SnapshotError(
            f"the cache has {layer.number_of_states} states per layer, the snapshot {', '.join(beyond)}"
        )
    change = Change(layer)
    change.stale = [*(vars(layer).keys() - vars(blank_linear(layer)).keys())]  # such as the history of `rollback`
    new = change.new
    for name, states, ready in _states(new):
        for i in range(layer.number_of_states):
            held, part = states[i] if ready[i] else None, parts.get(f"{name}.{i}")
            recorded = name == "conv" and layer.record_past
            if part is None:
                if held is not None:
                    change.copies.append((held, None))
            elif held is None:
                part = part.to(device)
                new.lazy_initialization(**{f"{name}_states": part}, state_idx=i)
                states[i] = part.clone() if recorded else states[i].copy_(part)
            else:
                fits(f"{name}.{i}", _window(layer, i) if name == "conv" else held, part)
                if recorded:  # transformers also replaces these tensors instead of writing to them
                    states[i] = part.to(held.device, copy=True)
                else:
                    change.copies.append((held, part))
    for i in range(layer.number_of_states):
        new.has_previous_state[i] = f"conv.{i}" in parts or f"recurrent.{i}" in parts
    return change


# ------------------------------------------------------------------------------------------------------------ attention


def _tokens(layer: Any) -> int:
    return int(layer.get_seq_length())


def read_growing(layer: Any) -> Parts:
    return {"keys": layer.keys, "values": layer.values} if _tokens(layer) else {}


def read_static(layer: Any) -> Parts:
    tokens = _tokens(layer)
    return {"keys": layer.keys[:, :, :tokens], "values": layer.values[:, :, :tokens]} if tokens else {}


def prepare_growing(layer: Any, parts: Parts, device: torch.device | None, length: int) -> Change:
    change = Change(layer)
    new = change.new
    if not parts:
        new.keys = new.values = None
        new.is_initialized = False
        return change
    if layer.is_initialized:
        device = layer.device
        for name in ("keys", "values") if _tokens(layer) else ():
            fits(name, getattr(layer, name), parts[name], free=2)
    keys, values = (parts[name].to(device, copy=True) for name in ("keys", "values"))
    new.lazy_initialization(keys, values)
    new.keys, new.values = keys, values
    return change


def _fill(change: Change, name: str, length: str, part: Tensor | None, ready: bool) -> None:
    """Copy a part to a static buffer and set the counter `length`: at commit if `ready`, else now (a new buffer)."""
    buffer, count = getattr(change.new, name), getattr(change.new, length)
    dimension = GROWING[name]
    tokens, room = 0 if part is None else part.shape[dimension], buffer.shape[dimension]
    if part is not None:
        fits(name, buffer.narrow(dimension, 0, tokens), part)
    copies = [
        (buffer.narrow(dimension, tokens, room - tokens), None),
        (count, torch.tensor(tokens)),
    ]
    if part is not None:
        copies.append((buffer.narrow(dimension, 0, tokens), part))
    if ready:
        change.copies += copies
        return
    for held, new in copies:
        held.zero_() if new is None else held.copy_(new)


def prepare_static(layer: Any, parts: Parts, device: torch.device | None, length: int) -> Change:
    change = Change(layer)
    new, ready = change.new, layer.is_initialized
    if not parts and not ready:
        return change
    if parts and parts["keys"].shape[2] > layer.max_cache_len:
        raise SnapshotError(
            f"the cache has room for {layer.max_cache_len} tokens, the snapshot {parts['keys'].shape[2]}"
        )
    if not ready:
        new.cumulative_length = torch.zeros_like(layer.cumulative_length)
        new.lazy_initialization(*(parts[name][:, :, :0].to(device) for name in ("keys", "values")))
    for name in ("keys", "values"):
        _fill(change, name, "cumulative_length", parts.get(name), ready)
    return change


def blank_static(layer: Any) -> Any:
    return type(layer)(max_cache_len=layer.max_cache_len)


# -------------------------------------------------------------------------------------------------------------- indexed


def _positions(layer: Any) -> Parts:
    held = getattr(layer, "indexer_position_ids", None)  # else it is on the cache (`upstream.indexer_positions`)
    return {} if held is None else {"indexer_position_ids": held}


def read_indexed(layer: Any) -> Parts:
    parts = read_growing(layer)
    if parts and layer.is_indexer_initialized:
        parts["indexer_keys"] = layer.indexer_keys
    return {**parts, **_positions(layer)} if parts else {}


def read_static_indexed(layer: Any) -> Parts:
    parts = read_static(layer)
    if parts and layer.is_indexer_initialized:
        parts["indexer_keys"] = layer.indexer_keys[:, : int(layer.indexer_cumulative_length)]
    return {**parts, **_positions(layer)} if parts else {}


def _put_positions(change: Change, parts: Parts) -> None:
    part = parts.get("indexer_position_ids")
    if hasattr(change.layer, "indexer_position_ids"):
        keys = change.new.keys
        change.new.indexer_position_ids = None if part is None else part.to(keys.device, copy=True)


def prepare_indexed(layer: Any, parts: Parts, device: torch.device | None, length: int) -> Commit:
    change = prepare_growing(layer, parts, device, length)
    new, part = change.new, parts.get("indexer_keys")
    new.is_indexer_initialized = part is not None
    new.indexer_keys = None
    if part is not None:
        if layer.is_indexer_initialized and layer.indexer_keys is not None and layer.indexer_keys.dim() == part.dim():
            fits("indexer_keys", layer.indexer_keys, part, free=1)
        part = part.to(new.keys.device, copy=True)
        new.lazy_initialization_indexer(part)
        new.indexer_keys = part
    _put_positions(change, parts)
    return change


def prepare_static_indexed(layer: Any, parts: Parts, device: torch.device | None, length: int) -> Commit:
    change = prepare_static(layer, parts, device, length)
    new, part, ready = change.new, parts.get("indexer_keys"), layer.is_indexer_initialized
    if part is not None and not ready:
        if layer.indexer_cumulative_length is not None:
            new.indexer_cumulative_length = torch.zeros_like(layer.indexer_cumulative_length)
        new.lazy_initialization_indexer(part[:, :0].to(new.keys.device))
    if part is not None or ready:
        _fill(change, "indexer_keys", "indexer_cumulative_length", part, ready)
    _put_positions(change, parts)
    return change
