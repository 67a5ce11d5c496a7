"""What one forward does with the buffers of a `SinkCache`: which slot a token goes to, who sees what, how sinks turn.

Tokens of a row are counted without padding: n = 0, 1, ... Token n lies in slot n while n < sinks, then in slot
sinks + (n - sinks) mod window. With C = sinks + window slots, e(n) = max(0, n + 1 - C) tokens are gone when token n
asks. Rotary scores depend on differences of positions alone, so keys in the window are right as they came, however many
are gone, and only a sink's key has to follow: turned on by e(n), from the key as it came, in fp32, so that nothing adds
up.

A piece of several tokens that passes C has another e for each of its tokens. Each then gets sinks of its own, turned
for it and hidden from the others: what it reads is what it would have read had it come alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Slots of a full-attention layer, and how far positions run before they are set back (`SinkCache`)."""

    sinks: int
    window: int

    @property
    def slots(self) -> int:
        """Tokens that a layer keeps, C."""
        return self.sinks + self.window

    @property
    def era(self) -> int:
        """The power of two at or above C: an angle of that many positions is exact in fp32."""
        return 1 << (self.slots - 1).bit_length()

    def base(self, n: Tensor) -> Tensor:
        """What is taken off the positions of a forward that begins with tokens n ``[B]``: a multiple of `era`."""
        return ((n - self.slots) // self.era).clamp(min=0) * self.era

    def slot(self, n: Tensor) -> Tensor:
        """Where tokens n go."""
        return torch.where(n < self.sinks, n, self.sinks + (n - self.sinks) % self.window)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """The rotary dimensions of x ``[..., 2 F and more]``, turned by angle ``[..., F]``, in at least fp32.

    Dimension i is paired with F + i, as keys of all families lie when they reach a cache.
    """
    half = angle.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    first, second = x[..., :half].to(dtype), x[..., half : 2 * half].to(dtype)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


@dataclass(frozen=True)
class SingleTokenPlan:
    """One token a row: it is written to its slot and the buffers themselves are read. Shapes and addresses stay."""

    sizes: Sizes
    slot: Tensor  # [B]
    used: int  # leading slots that are read
    inv_freq: Tensor | None  # [F], None for a model without rotary keys
    arrives: Tensor | None  # [B, sinks], which sinks are this token; None for none
    turn: Tensor | None  # [B], how many positions sinks are turned on; None while nothing is gone

    def apply(self, layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, H, 1, D]`` to the layer's buffers and return what is read."""
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
    """Several tokens a row: they are read beside what is held, then those that stay are written to their slots."""

    sizes: Sizes
    begin: int  # slots that are read: from here
    end: int  # up to here
    source: Tensor  # [B, C], the column of the piece that a slot's token is in
    fresh: Tensor  # [B, C], whether it is in the piece at all
    evicts: bool  # whether more than C tokens come together: sinks are then read behind the piece, not from their slots
    inv_freq: Tensor | None  # [F], None for a model without rotary keys
    turn: Tensor | None  # [B, T], how far each token's own sinks are turned on; None: all read the same

    @property
    def alone(self) -> bool:
        """Whether the piece reads nothing but itself, all that went before."""
        return self.end == 0 and not self.evicts

    def apply(self, layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, H, T, D]`` to the layer's buffers and return what is read."""
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
        """The sinks ``[B, H, sinks, D]``, or ``[B, H, T sinks, D]`` where each token has its own."""
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
    """The plan of one token a row, and who sees what ``[B, 1, used]`` (None: all see all).

    `counts` is n ``[B]`` on the host; without it (under torch.compile, in a CUDA graph) nothing depends on numbers.
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
    """The plan of a piece ``[B, T]`` whose tokens `real` tells from padding.

    Returns:
        The plan; who sees what, ``[B, T, keys read]``; and which token is where, ``[B, T]``.
    """
    sinks, window, slots = sizes.sinks, sizes.window, sizes.slots
    length, device = real.shape[1], n.device
    evicts = max(counts) + length > slots
    n = n[:, None]
    token = n + real.cumsum(1) - 1
    after = token[:, -1:] + 1
    # What each slot holds afterwards: the last token that goes there; and which column it is in.
    slot = torch.arange(slots, device=device)[None]
    last = torch.where(slot < sinks, slot, slot + (after - 1 - slot).clamp(min=0) // window * window)
    order = real.logical_not().to(torch.uint8).argsort(stable=True, dim=1)
    source = order.gather(1, (last - n).clamp(0, length - 1))
    fresh = (last >= n) & (last < after)
    # Who sees what: [B, T, held slots | piece | sinks].
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
    parts[1] = parts[1] | (itself & real.logical_not()[..., None])  # padding sees itself: a row of nothing would be NaN
    plan = MultiTokenPlan(sizes, begin, end, source, fresh, evicts, inv_freq, turn)
    return plan, torch.cat(parts, 2), token
