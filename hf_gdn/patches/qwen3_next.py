"""Qwen3-Next: Gated DeltaNet with q, k, v, z (and b, a) interleaved per key head in one projection each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mixer import Family, Projected
from .parts import gated_norm, softplus_decay


class Qwen3Next(Family):
    """A key head's row of ``in_proj_qkvz`` is q | k | v of its value heads | z of them; of ``in_proj_ba``, b | a."""

    name = "qwen3_next"
    class_name = "Qwen3NextGatedDeltaNet"
    model_name = "Qwen3NextModel"
    op = "gdn"
    about = "projections interleaved per key head"
    direct = ("conv1d", "norm")

    def project(self, layer: Any, x: Tensor) -> Projected:
        k_heads, v_heads, k_dim, v_dim = self.dims(layer)
        group = v_heads // k_heads
        per_head = layer.in_proj_qkvz(x).view(*x.shape[:2], k_heads, -1)
        q, k, v, z = per_head.split_with_sizes((k_dim, k_dim, group * v_dim, group * v_dim), -1)
        ba = layer.in_proj_ba(x).view(*x.shape[:2], k_heads, 2, group)
        b, a = ba.transpose(2, 3).reshape(*x.shape[:2], 2, v_heads).unbind(2)
        g = softplus_decay(layer.A_log, a.float() + layer.dt_bias)
        qkv = torch.cat((q.flatten(2), k.flatten(2), v.flatten(2)), -1)
        return Projected(qkv, g, b.sigmoid(), z.reshape(*x.shape[:2], v_heads, v_dim))

    def finish(self, layer: Any, o: Tensor, z: Tensor) -> Tensor:
        return layer.out_proj(gated_norm(layer.norm, o, z).flatten(2))


FAMILY = Qwen3Next()
