"""OLMo-Hybrid: Gated DeltaNet with a projection each, beta up to 2, K and V of different, odd sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mixer import Family, Projected
from .parts import gated_norm, softplus_decay


class OlmoHybrid(Family):
    """Beta is doubled where negative eigenvalues are allowed."""

    name = "olmo_hybrid"
    class_name = "OlmoHybridGatedDeltaNet"
    model_name = "OlmoHybridModel"
    op = "gdn"
    about = "β up to 2, K ≠ V"
    direct = ("conv1d", "o_norm")

    def project(self, layer: Any, x: Tensor) -> Projected:
        qkv = torch.cat((layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)), -1)
        beta = layer.b_proj(x).sigmoid()
        g = softplus_decay(layer.A_log, layer.a_proj(x).float() + layer.dt_bias)
        z = layer.g_proj(x).view(*x.shape[:2], layer.num_v_heads, layer.head_v_dim)
        return Projected(qkv, g, beta * 2.0 if layer.allow_neg_eigval else beta, z)

    def finish(self, layer: Any, o: Tensor, z: Tensor) -> Tensor:
        return layer.o_proj(gated_norm(layer.o_norm, o, z).flatten(2))


FAMILY = OlmoHybrid()
