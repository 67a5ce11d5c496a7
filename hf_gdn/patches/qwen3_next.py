"""Qwen3-Next: Gated DeltaNet with q, k, v, z (and b, a) interleaved per key head in one projection each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixer import Dims, Family, Projected


class Qwen3Next(Family):
    """A key head's row of ``in_proj_qkvz`` is q | k | v of its value heads | z of them; of ``in_proj_ba``, b | a."""

    name = "qwen3_next"
    module = "transformers.models.qwen3_next.modeling_qwen3_next"
    class_name = "Qwen3NextGatedDeltaNet"
    op = "gdn"

    def dims(self, layer: Any) -> Dims:
        return Dims(layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)

    def project(self, layer: Any, x: Tensor) -> Projected:
        k_heads, v_heads, k_dim, v_dim = self.dims(layer)
        group = v_heads // k_heads
        per_head = layer.in_proj_qkvz(x).unflatten(-1, (k_heads, -1))
        q, k, v, z = per_head.split((k_dim, k_dim, group * v_dim, group * v_dim), -1)
        b, a = (y.flatten(2) for y in layer.in_proj_ba(x).unflatten(-1, (k_heads, -1)).split((group, group), -1))
        g = -layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias)
        qkv = torch.cat((q.flatten(2), k.flatten(2), v.flatten(2)), -1)
        return Projected(qkv, g, b.sigmoid(), z.reshape(*x.shape[:2], v_heads, v_dim))

    def finish(self, layer: Any, o: Tensor, z: Tensor) -> Tensor:
        o = layer.norm(o.reshape(-1, o.shape[-1]), z.reshape(-1, z.shape[-1]))
        return layer.out_proj(o.view(*z.shape[:2], -1))


FAMILY = Qwen3Next()
