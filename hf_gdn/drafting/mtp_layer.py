"""What the layer of a head computes, and what it remembers.

The host's time limits drafting, so the attention is written out here: transformers' `MtpLayer` takes two fifths longer
a token (docs/tuning.md). Its modules hold the weights and are called one by one, quantized ones too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FIRST = 256  # tokens that a cache has room for at first


class Rotary(NamedTuple):
    """Rotary embeddings of positions: ``[1, T, 1, rotary dimensions]`` each, the first half of `sin` negated."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, model: Any, like: Tensor, positions: Tensor) -> Rotary:
        """Those of a model, on a tensor's device and in its dtype.

        Args:
            model: the model, whose frequencies they are.
            like: the tensor.
            positions: ``[1, T]``, or ``[3, 1, T]`` of time, height and width.
        """
        rotary = model.get_decoder().rotary_emb
        grid = positions.expand(3, 1, -1) if hasattr(rotary, "mrope_section") else positions
        cos, sin = (x.to(like.device) for x in rotary(like, position_ids=grid))
        first, second = sin.chunk(2, -1)
        return cls(cos[:, :, None], torch.cat((-first, second), -1)[:, :, None])

    def part(self, begin: int, end: int) -> Rotary:
        """Of some of the positions."""
        return Rotary(self.cos[:, begin:end], self.sin[:, begin:end])

    def turn(self, heads: Tensor) -> Tensor:
        """Turn the first dimensions of heads ``[1, T, H, D]``."""
        width = self.cos.shape[-1]
        turned = heads[..., :width]
        turned = turned * self.cos + turned.roll(width // 2, -1) * self.sin
        return torch.cat((turned, heads[..., width:]), -1)


class HeadCache:
    """Keys and values of the tokens that a head has read, in buffers that double when they are full."""

    def __init__(self) -> None:
        self.length = 0
        self._held: Tensor | None = None  # [2, 1, H, room, D]

    def drop(self, count: int) -> None:
        """Drop the last tokens."""
        self.length -= count

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of T tokens, ``[1, H, T, D]``; returns all ``[1, H, length, D]``, views."""
        begin, self.length = self.length, self.length + keys.shape[2]
        held = self._held
        if held is None or held.shape[3] < self.length:
            room = max(_FIRST, 2 * self.length)
            grown = keys.new_empty((2, *keys.shape[:2], room, keys.shape[3]))
            if held is not None:
                grown[:, :, :, :begin] = held[:, :, :, :begin]
            self._held = held = grown
        held[0, :, :, begin : self.length] = keys
        held[1, :, :, begin : self.length] = values
        return held[0, :, :, : self.length], held[1, :, :, : self.length]


def run(layer: Any, embeds: Tensor, hidden: Tensor, rotary: Rotary, cache: HeadCache | None) -> Tensor:
    """The layer's outputs ``[1, T, hidden]`` for embeddings and hidden states of that shape."""
    block = layer.mtp_block
    found = layer.eh_proj(torch.cat((layer.enorm(embeds), layer.hnorm(hidden)), -1))
    found = found + _attend(block.self_attn, block.input_layernorm(found), rotary, cache)
    mixed = block.mlp(block.post_attention_layernorm(found))
    return layer.post_norm(found + (mixed[0] if isinstance(mixed, tuple) else mixed))


def _attend(layer: Any, x: Tensor, rotary: Rotary, cache: HeadCache | None) -> Tensor:
    """Gated attention to the tokens before, too."""
    batch, tokens = x.shape[:2]
    query, gate = layer.q_proj(x).view(batch, tokens, -1, 2 * layer.head_dim).chunk(2, -1)
    query, key = layer.q_norm(query), layer.k_norm(layer.k_proj(x).view(batch, tokens, -1, layer.head_dim))
    value = layer.v_proj(x).view(key.shape).transpose(1, 2)
    query, key = rotary.turn(torch.cat((query, key), 2)).transpose(1, 2).split((query.shape[2], key.shape[2]), 1)
    if cache is not None:
        key, value = cache.append(key, value)
    before, mask = key.shape[2] - tokens, None
    if tokens > 1 and before > 0:
        mask = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=x.device).tril(before)
    causal = tokens > 1 and before == 0
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": causal, "scale": layer.scaling, "enable_gqa": True}
    out = F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)
    return layer.o_proj((out * gate.sigmoid()).flatten(2))
