"""Prefix cache: a shared prompt prefix is processed only once. Entries are keyed by token ids, within a byte budget.

Recurrent states cannot be cropped to an earlier token, so a prefix can only be reused where a snapshot was taken: at
every multiple of `every` tokens and at the end of each prompt. Snapshots form a tree. A node holds the states at its
end, and keys and values of its own tokens only; those of earlier tokens are in its ancestors, so nothing is stored
twice. Eviction removes the least recently used leaf first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from ..upstream import between_calls, cache_names
from .snapshots.api import Snapshot, own, put, read, repeat
from .snapshots.fingerprint import layer_devices
from .snapshots.layers import GROWING

_Ids = tuple[int, ...]


class _Node:
    """The tokens `ids` that follow those of `parent`. `held` has their keys and values and the states at their end."""

    def __init__(self, parent: _Node | None, ids: _Ids, held: Snapshot | None) -> None:
        self.parent, self.ids, self.held = parent, ids, held
        self.end = 0 if held is None else held.length
        self.nbytes = 0 if held is None else held.nbytes
        self.children: dict[_Ids, _Node] = {}
        self.used = 0

    def path(self) -> list[_Node]:
        """The nodes from the root, exclusive, to this node."""
        return [] if self.parent is None else [*self.parent.path(), self]

    def deepest(self, ids: _Ids) -> _Node:
        """The node, this one or below it, whose path is the longest prefix of `ids`."""
        found = self
        for size in {len(child) for child in self.children}:
            child = self.children.get(ids[self.end : self.end + size])
            if child is not None:
                found = max(found, child.deepest(ids), key=lambda node: node.end)
        return found

    def below(self) -> Iterator[_Node]:
        for child in self.children.values():
            yield child
            yield from child.below()


class PrefixCache:
    """Caches prompt prefixes of one model.

    ``model.generate(**inputs, cache=prefixes.prefill(**inputs))`` processes only the tokens of a prompt after its
    longest cached prefix.

    Args:
        model: a causal language model. Call `clear` after changing its weights.
        max_bytes: memory budget of all snapshots; `nbytes` is the current use.
        every: tokens between snapshots inside a prompt. Each snapshot holds one set of recurrent states. If two prompts
            diverge between snapshots, up to `every` - 1 shared tokens are processed again.
        device: device that stores snapshots; None keeps them where they were made.

    Attributes:
        tokens_read: tokens that `prefill` ran through the model.
        tokens_reused: tokens that `prefill` took from the cache (hits).

    Examples:
        >>> from hf_gdn.caches import PrefixCache
        >>> prefixes = PrefixCache(model, max_bytes=2**24)
        >>> for _ in range(2):
        ...     cache = prefixes.prefill(**inputs)
        >>> prefixes.tokens_read, prefixes.tokens_reused
        (7, 7)
    """

    def __init__(
        self, model: nn.Module, max_bytes: int = 2**30, *, every: int = 1024, device: torch.device | str | None = None
    ) -> None:
        if max_bytes < 0 or every < 1:
            raise ValueError(f"PrefixCache needs max_bytes ≥ 0 and every ≥ 1, got {max_bytes} and {every}")
        self.model: Any = model
        self.max_bytes, self.every, self.device = max_bytes, every, device
        self.tokens_read = self.tokens_reused = 0
        self.clear()

    def clear(self) -> None:
        """Remove all prefixes."""
        self._root, self._clock, self.nbytes = _Node(None, (), None), 0, 0

    def __len__(self) -> int:
        """Number of snapshots."""
        return sum(1 for _ in self._root.below())

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, cache: Cache | None = None) -> Cache:
        """Return a cache that holds the beginning of a prompt; pass it to ``generate`` or to a forward.

        A single sequence is processed up to, but excluding, its last token, which the model needs for its next logits.
        Of several sequences, the common prefix is processed once and copied to all rows; it ends before any padding
        and before the first image, video or sound, whose tokens do not say what it shows. A model with vision forgets
        the position offset of its last prompt (``rope_deltas``), as in ``generate`` with an empty cache.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``, 0 for padding.
            cache: an empty cache to fill, such as a StaticCache; None makes a DynamicCache.

        Raises:
            SnapshotError: snapshots do not support the model's caches, or `cache` is too short.
            ValueError: input_ids is not ``[B, T]``, or `cache` is not empty.
        """
        if input_ids.dim() != 2 or not input_ids.numel():
            raise ValueError(f"input_ids must be [B, T], got {list(input_ids.shape)}")
        if cache is not None and int(cache.get_seq_length()):
            raise ValueError(f"the cache must be empty, it holds {int(cache.get_seq_length())} tokens")
        working = DynamicCache(config=self.model.config)
        seen = between_calls.is_placeholder(input_ids, self.model.config)
        between_calls.forget_positions(self.model)
        ids = _common(input_ids, attention_mask, seen)
        devices = layer_devices(self.model, len(working.layers))
        if ids:
            self._read(ids, input_ids[:1], working, devices)
        if ids and (cache is not None or len(input_ids) > 1):
            cache = DynamicCache(config=self.model.config) if cache is None else cache
            put(cache, repeat(read(working), len(input_ids)), devices)
            return cache
        return working if cache is None else cache

    @torch.no_grad()
    def add(self, input_ids: Tensor, cache: Cache) -> None:
        """Store a cache after generation, so that the next turn of the conversation continues from it.

        Args:
            input_ids: ``[1, T]``, the tokens of the whole sequence; T is at least the number of tokens in the cache.
            cache: cache of one sequence without padding, from its first token on.

        Raises:
            ValueError: input_ids does not fit the cache, the cache holds several sequences, or images.
        """
        found = read(cache)
        if input_ids.dim() != 2 or len(input_ids) != 1 or input_ids.shape[1] < found.length or found.batch_size != 1:
            raise ValueError(
                f"input_ids must be [1, T] with T ≥ {found.length}, the tokens in the cache, and the cache must hold 1 "
                f"sequence; got {list(input_ids.shape)} and {found.batch_size} sequences"
            )
        if between_calls.is_placeholder(input_ids[:, : found.length], self.model.config).any():
            raise ValueError("the cache holds images, videos or sounds, whose token ids do not say what they show")
        ids = tuple(input_ids[0, : found.length].tolist())
        node = self._root.deepest(ids)
        self._touch(node)
        if node.end < found.length:
            self._keep(node, ids[node.end :], found)

    def _read(self, ids: _Ids, row: Tensor, cache: Cache, devices: list[torch.device | None]) -> None:
        """Fill an empty cache of one sequence with `ids`, which are the first tokens of `row` ``[1, T]``."""
        node = self._root.deepest(ids)
        self._touch(node)
        start = node.end
        if start:
            put(cache, _join([step.held for step in node.path() if step.held is not None]), devices)
        self.tokens_reused += start
        while start < len(ids):
            end = min(len(ids), start - start % self.every + self.every)
            self.model(row[:, start:end], **cache_names.as_argument(cache), use_cache=True, logits_to_keep=1)
            self.tokens_read += end - start
            node = self._keep(node, ids[node.end : end], read(cache))
            start = end

    def _keep(self, node: _Node, ids: _Ids, found: Snapshot) -> _Node:
        """Add a child of `node` for the tokens `ids`, with their part of `found`; return `node` if there is no room."""
        held = _after(found, node.end)
        if not self._make_room(held.nbytes, node.path()):
            return node
        held = held._with(lambda _, part: own(part) if self.device is None else part.to(self.device, copy=True))
        child = node.children[ids] = _Node(node, ids, held)
        self.nbytes += held.nbytes
        self._touch(child)
        return child

    def _touch(self, node: _Node) -> None:
        self._clock += 1
        for step in node.path():
            step.used = self._clock

    def _make_room(self, size: int, kept: list[_Node]) -> bool:
        """Evict leaves, but none of `kept`, until `size` bytes fit. Returns False if they cannot fit."""
        if sum(node.nbytes for node in kept) + size > self.max_bytes:
            return False
        while self.nbytes + size > self.max_bytes:
            leaves = [node for node in self._root.below() if not node.children and node not in kept]
            oldest = min(leaves, key=lambda node: node.used)
            assert oldest.parent is not None
            del oldest.parent.children[oldest.ids]
            self.nbytes -= oldest.nbytes
        return True


def _common(input_ids: Tensor, mask: Tensor | None, left_out: Tensor) -> _Ids:
    """The common prefix of all rows, without padding and tokens `left_out`, and of at most T - 1 tokens."""
    same = ((input_ids == input_ids[:1]) & ~left_out).all(0)
    if mask is not None:
        same = same & (mask != 0).all(0)
    count = int(same.long().cumprod(0).sum())
    return tuple(input_ids[0, : min(count, input_ids.shape[1] - 1)].tolist())


def _after(found: Snapshot, start: int) -> Snapshot:
    """A view of a snapshot with its states, but keys and values from token `start` on only."""
    return found._with(
        lambda name, part: part.narrow(GROWING[name], start, found.length - start) if name in GROWING else part
    )


def _join(path: list[Snapshot]) -> Snapshot:
    """Join the snapshots of consecutive runs of tokens."""
    layers = tuple(
        {
            name: torch.cat([piece.layers[index][name] for piece in path], GROWING[name]) if name in GROWING else part
            for name, part in parts.items()
        }
        for index, parts in enumerate(path[-1].layers)
    )
    return Snapshot(path[-1].kinds, layers, path[-1].length)
