"""Plan how one forward uses the buffers of a `SinkCache`: the slot of each token, the mask, and the rotation of sinks.

Tokens of a row are numbered without padding: n = 0, 1, ... Token n is in slot n if n < sinks, else in slot
sinks + (n - sinks) mod window. With C = sinks + window slots, e(n) = max(0, n + 1 - C) tokens have been evicted when
token n queries. Rotary scores depend on differences of positions only, so keys in the window stay correct. A sink's key
is rotated forward by e(n), always from the original key in fp32, so that errors do not accumulate.

If a piece of several tokens exceeds C, e differs between its tokens. Each token then gets its own rotated copy of the
sinks, masked for all other tokens, so it reads the same keys as if it were processed alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Slots of a full-attention layer, and the period at which positions are reduced (`SinkCache`)."""

    sinks: int
    window: int

    @property
    def slots(self) -> int:
        """C, the number of tokens that a layer stores."""
        return self.sinks + self.window

    @property
    def era(self) -> int:
        """The power of two at or above C: an angle of that many positions is exact in fp32."""
        return 1 << (self.slots - 1).bit_length()

    def base(self, n: Tensor) -> Tensor:
        """How much positions are reduced in a forward that begins with tokens n ``[B]``: a multiple of `era`."""
        return ((n - self.slots) // self.era).clamp(min=0) * self.era

    def slot(self, n: Tensor) -> Tensor:
        """The slots of tokens n."""
        return torch.where(n < self.sinks, n, self.sinks + (n - self.sinks) % self.window)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the first 2 F dimensions of x ``[..., D]`` by angle ``[..., F]``, in at least fp32; returns only these.

    Dimension i is paired with F + i, which is the layout of cached keys in all families.
    """
    half = angle.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    first, second = x[..., :half].to(dtype), x[..., half : 2 * half].to(dtype)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


@dataclass(frozen=True)
class SingleTokenPlan:
    """One token per row: write it to its slot and read the buffers themselves. Shapes and addresses are fixed."""

    sizes: Sizes
    slot: Tensor  # [B]
    used: int  # number of leading slots that are read
    inv_freq: Tensor | None  # [F], None for a model without rotary keys
    arrives: Tensor | None  # [B, sinks], which sink the token is; None if it is a sink in no row
    turn: Tensor | None  # [B], positions that sinks are rotated forward; None if no token has been evicted

    def apply(self, layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, H, 1, D]`` to the layer's buffers; return those that the query reads."""
        slot = self.slot.to(keys.device)[:, None, None, None]
        for held, new in ((layer.keys, keys), (layer.values, values)):
            held.scatter_(2, slot.expand_as(new), new)
        if self.inv_freq is not None and self.sizes.sinks:
            frequencies, width = self.inv_freq.to(keys.device), 2 * len(self.inv_freq)
            new, held = (values, layer.values) if layer.rotary_values else (keys, layer.keys)
            if self.arrives is not None:
                here = self.arrives.to(keys.device)[:, None, :, None]
                layer.sinks.copy_(torch.where(here, new[..., :width], layer.sinks))
            if self.turn is not None:
                angle = self.turn.to(keys.device)[:, None, None, None].float() * frequencies
                held[:, :, : self.sizes.sinks, :width] = turned(layer.sinks, angle)
        return layer.keys[:, :, : self.used], layer.values[:, :, : self.used]


@dataclass(frozen=True)
class MultiTokenPlan:
    """Several tokens per row: queries read the stored keys and the piece; then the last tokens go to their slots."""

    sizes: Sizes
    begin: int  # first slot that is read
    end: int  # end of the slots that are read, exclusive
    source: Tensor  # [B, C], column of the piece that holds the new token of each slot
    fresh: Tensor  # [B, C], whether the slot's token is in the piece
    evicts: bool  # whether there are more than C tokens in total; sinks are then read after the piece, not from slots
    inv_freq: Tensor | None  # [F], None for a model without rotary keys
    turn: Tensor | None  # [B, T], positions that each token's own sinks are rotated; None if all read the same sinks

    @property
    def alone(self) -> bool:
        """Whether the piece reads only its own keys, with a plain causal mask."""
        return self.end == 0 and not self.evicts

    def apply(self, layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, H, T, D]`` to the layer's buffers; return those that the queries read."""
        sinks = self.sizes.sinks
        source, fresh = self.source.to(keys.device)[:, None, :, None], self.fresh.to(keys.device)[:, None, :, None]
        pairs = ((layer.keys, keys), (layer.values, values))
        kept = []
        for held, new in pairs:
            came = new.gather(2, source.expand(-1, new.shape[1], -1, new.shape[3]))
            kept.append(torch.where(fresh, came, held))
        for (held, _), slots in zip(pairs, kept):
            held[:, :, :sinks] = slots[:, :, :sinks]
        if self.inv_freq is not None:
            came, width = kept[layer.rotary_values][:, :, :sinks], 2 * len(self.inv_freq)
            layer.sinks.copy_(torch.where(fresh[:, :, :sinks], came[..., :width], layer.sinks))
        read = []
        for which, (held, new) in enumerate(pairs):
            parts = [held[:, :, self.begin : self.end], new] if self.end > self.begin else [new]
            if self.evicts:
                parts.append(self._sinks(layer, held, bool(layer.rotary_values) == bool(which)))
            read.append(torch.cat(parts, 2) if len(parts) > 1 else new)
        for (held, _), slots in zip(pairs, kept):
            held[:, :, sinks:] = slots[:, :, sinks:]
        return read[0], read[1]

    def _sinks(self, layer: Any, held: Tensor, rotary: bool) -> Tensor:
        """The sinks ``[B, H, sinks, D]``, or ``[B, H, T sinks, D]`` if each token has its own."""
        sinks = held[:, :, : self.sizes.sinks]
        if self.turn is None or self.inv_freq is None:
            return sinks
        turn = self.turn.to(held.device)
        own = sinks[:, :, None].expand(-1, -1, turn.shape[1], -1, -1)
        if rotary:
            angle = turn[:, None, :, None, None].float() * self.inv_freq.to(held.device)
            own = torch.cat((turned(layer.sinks[:, :, None], angle), own[..., 2 * len(self.inv_freq) :]), -1)
        return own.flatten(2, 3)


def plan_step(
    sizes: Sizes, n: Tensor, base: Tensor, inv_freq: Tensor | None, counts: list[int] | None
) -> tuple[SingleTokenPlan, Tensor | None]:
    """Return the plan for one token per row, and its mask ``[B, 1, used]`` (None if every slot is visible).

    `counts` is n ``[B]`` on the host. If it is None (torch.compile, CUDA graphs), the plan does not depend on values.
    """
    sinks, slots = sizes.sinks, sizes.slots
    used = slots if counts is None else min(max(counts) + 1, slots)
    arrives = turn = None
    if inv_freq is not None:
        if counts is None or min(counts) < sinks:
            arrives = torch.arange(sinks, device=n.device) == n[:, None]
        if counts is None or max(counts) >= slots:
            turn = (n + 1 - slots).clamp(min=0) - base
    seen = None
    if counts is None or min(counts) + 1 < used:
        seen = (torch.arange(used, device=n.device) <= n[:, None])[:, None]
    return SingleTokenPlan(sizes, sizes.slot(n), used, inv_freq, arrives, turn), seen


def plan_piece(
    sizes: Sizes, n: Tensor, base: Tensor, inv_freq: Tensor | None, counts: list[int], real: Tensor
) -> tuple[MultiTokenPlan, Tensor, Tensor]:
    """Plan a piece ``[B, T]``; `real` ``[B, T]`` is true for tokens, false for padding.

    Returns:
        The plan, the mask ``[B, T, keys read]``, and the number n of each token ``[B, T]``.
    """
    sinks, window, slots = sizes.sinks, sizes.window, sizes.slots
    length, device = real.shape[1], n.device
    evicts = max(counts) + length > slots
    n = n[:, None]
    token = n + real.cumsum(1) - 1
    after = token[:, -1:] + 1
    # The token that each slot holds afterwards (the last one that maps to it) and its column.
    slot = torch.arange(slots, device=device)[None]
    last = torch.where(slot < sinks, slot, slot + (after - 1 - slot).clamp(min=0) // window * window)
    order = real.logical_not().to(torch.uint8).argsort(stable=True, dim=1)
    source = order.gather(1, (last - n).clamp(0, length - 1))
    fresh = (last >= n) & (last < after)
    # The mask: [B, T, stored slots | piece | sinks].
    columns = torch.arange(length, device=device)
    itself = columns[:, None] == columns
    seen = real[:, None] & (columns[:, None] >= columns)
    oldest = (token - window + 1)[:, :, None]
    begin, end = (min(sinks, max(counts)) if evicts else 0), min(max(counts), slots)
    held = torch.arange(begin, end, device=device)[None]
    turn = None
    if evicts:
        seen = seen & (token >= sinks)[:, None] & (token[:, None] >= oldest)
        there = held + (n - 1 - held).clamp(min=0) // window * window
        past = ((held < n) & (there < n))[:, None] & (there[:, None] >= oldest)
        own = torch.arange(sinks, device=device) <= token[:, :, None]
        if inv_freq is not None:
            turn = (token + 1 - slots).clamp(min=0) - base[:, None]
            own = (own[:, :, None] & itself[..., None]).flatten(2)
        parts = [past, seen, own]
    else:
        parts = [(held < n)[:, None].expand(-1, length, -1), seen]
    parts[1] = parts[1] | (itself & real.logical_not()[..., None])  # padding sees itself: an empty mask row gives NaN
    plan = MultiTokenPlan(sizes, begin, end, source, fresh, evicts, inv_freq, turn)
    return plan, torch.cat(parts, 2), token
