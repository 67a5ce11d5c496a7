"""Qwen3.5: Gated DeltaNet with q | k | v in one projection, z, b and a in one each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .mixer import Family, Projected
from .parts import gated_norm, softplus_decay


class Qwen3_5(Family):
    """As Qwen3-Next, but for the layout of the projections."""

    name = "qwen3_5"
    class_name = "Qwen3_5GatedDeltaNet"
    model_name = "Qwen3_5TextModel"
    op = "gdn"
    about = "text tower too"
    direct = ("conv1d", "norm")

    def project(self, layer: Any, x: Tensor) -> Projected:
        z = layer.in_proj_z(x).view(*x.shape[:2], layer.num_v_heads, layer.head_v_dim)
        g = softplus_decay(layer.A_log, layer.in_proj_a(x).float() + layer.dt_bias)
        return Projected(layer.in_proj_qkv(x), g, layer.in_proj_b(x).sigmoid(), z)

    def finish(self, layer: Any, o: Tensor, z: Tensor) -> Tensor:
        return layer.out_proj(gated_norm(layer.norm, o, z).flatten(2))


FAMILY = Qwen3_5()
