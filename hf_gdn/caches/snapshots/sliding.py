"""Snapshots of sliding-window attention layers, which keep keys and values of their last tokens only.

A growing layer holds the last ``window - 1`` tokens. A static layer has ``window`` slots; when all are in use, the
oldest one is not read any more. The parts of both have ``min(T, window - 1)`` tokens, the newest last.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import SnapshotError
from .layers import Change, Parts, fits

_NAMES = {"sliding_keys": "keys", "sliding_values": "values"}


def read_growing(layer: Any) -> Parts:
    """Parts of a DynamicSlidingWindowLayer, which holds more tokens than its window while it records the past."""
    if not layer.get_seq_length():
        return {}
    kept = min(layer.get_seq_length(), layer.sliding_window - 1)
    return {name: held[:, :, held.shape[2] - kept :] for name, held in _held(layer)}


def read_static(layer: Any) -> Parts:
    """Parts of a StaticSlidingWindowLayer."""
    tokens, slots = layer.get_seq_length(), layer.max_cache_len
    begin, end = (1, slots) if tokens >= slots else (0, tokens)
    return {name: held[:, :, begin:end] for name, held in _held(layer)} if tokens else {}


def _held(layer: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(layer, attribute)) for name, attribute in _NAMES.items()]


def blank_growing(layer: Any) -> Any:
    """An empty layer with the same window."""
    blank = type(layer)(sliding_window=layer.sliding_window)
    blank.record_past = layer.record_past
    return blank


def blank_static(layer: Any) -> Any:
    """An empty layer with the same window and size."""
    blank = copy.copy(layer)
    blank.keys = blank.values = None
    blank.is_initialized, blank.cumulative_length_int = False, 0
    blank.cumulative_length = torch.zeros_like(layer.cumulative_length)
    return blank


def prepare_growing(layer: Any, parts: Parts, device: torch.device | None, length: int) -> Change:
    """Restore a DynamicSlidingWindowLayer."""
    change = Change(layer)
    new = change.new
    new.cumulative_length = length if parts else 0
    if not parts:
        new.keys = new.values = None
        new.is_initialized = False
        return change
    _check_tokens(parts, length, layer.sliding_window)
    if layer.is_initialized:
        device = layer.device
        for name, held in _held(layer) if layer.get_seq_length() else ():
            fits(name, held, parts[name], free=2)
    keys, values = (parts[name].to(device, copy=True) for name in _NAMES)
    new.lazy_initialization(keys, values)
    new.keys, new.values = keys, values
    return change


def prepare_static(layer: Any, parts: Parts, device: torch.device | None, length: int) -> Change:
    """Restore a StaticSlidingWindowLayer, in place if its buffers exist."""
    change = Change(layer)
    new, ready, slots = change.new, layer.is_initialized, layer.max_cache_len
    if not parts and not ready:
        return change
    if parts:
        _check_tokens(parts, length, slots)
    if not ready:
        new.cumulative_length = torch.zeros_like(layer.cumulative_length)
        new.lazy_initialization(*(parts[name][:, :, :0].to(device) for name in _NAMES))
    copies: list[tuple[Any, Any]] = [(new.cumulative_length, torch.tensor(min(length, slots) if parts else 0))]
    for name, buffer in _held(new):
        if parts:
            fits(name, buffer[:, :, : parts[name].shape[2]], parts[name])
            oldest = 1 if length >= slots else 0  # a full buffer has one more slot, which is not read any more
            whole = F.pad(parts[name], (0, 0, oldest, slots - oldest - parts[name].shape[2]))
        else:
            whole = None
        copies.append((buffer, whole))
    new.cumulative_length_int = length if parts else 0
    if ready:
        change.copies += copies
        return change
    for held, part in copies:
        held.copy_(part)
    return change


def _check_tokens(parts: Parts, length: int, window: int) -> None:
    """Raise SnapshotError unless the parts have the number of tokens that this window keeps of `length` tokens."""
    kept, wanted = parts["sliding_keys"].shape[2], min(length, window - 1)
    if kept != wanted or parts["sliding_values"].shape[2] != wanted:
        raise SnapshotError(
            f"the cache's window of {window} keeps {wanted} of {length} tokens, the snapshot has {kept}"
        )
