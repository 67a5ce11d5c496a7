"""Kimi-Linear: Kimi delta attention, separate projections, low-rank forget gate and output gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixer import Dims, Family, Projected


class KimiLinear(Family):
    """The decay is -exp(A_log) softplus(f_b(f_a(x)) + dt_bias), one per key channel, without a bound."""

    name = "kimi_linear"
    module = "transformers.models.kimi_linear.modeling_kimi_linear"
    class_name = "KimiLinearDeltaAttention"
    op = "kda"
    direct = ("conv1d", "forget_gate", "o_norm")

    def dims(self, layer: Any) -> Dims:
        return Dims(layer.num_heads, layer.num_heads, layer.head_dim, layer.head_dim)

    def project(self, layer: Any, x: Tensor) -> Projected:
        heads = (*x.shape[:2], layer.num_heads, layer.head_dim)
        qkv = torch.cat((layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)), -1)
        gate = layer.forget_gate
        raw = gate.f_b_proj(gate.f_a_proj(x)).float() + gate.dt_bias.float()
        g = -gate.A_log.float().exp() * F.softplus(raw).view(heads)
        z = layer.g_b_proj(layer.g_a_proj(x)).view(heads)
        return Projected(qkv, g, layer.b_proj(x).sigmoid(), z)

    def finish(self, layer: Any, o: Tensor, z: Tensor) -> Tensor:
        norm = layer.o_norm
        o = F.rms_norm(o.float(), o.shape[-1:], norm.weight.float(), norm.variance_epsilon)  # all of it in fp32
        return layer.o_proj((o * z.float().sigmoid()).to(z.dtype).flatten(2))


FAMILY = KimiLinear()
