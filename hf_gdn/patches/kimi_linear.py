"""Kimi-Linear: Kimi delta attention, separate projections, low-rank forget gate and output gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mixer import Dims, Family, Projected
from .parts import gated_norm_fp32, own_call, softplus_decay


class KimiLinear(Family):
    """The decay is -exp(A_log) softplus(f_b(f_a(x)) + dt_bias), one per key channel, without a bound."""

    name = "kimi_linear"
    class_name = "KimiLinearDeltaAttention"
    model_name = "KimiLinearModel"
    op = "kda"
    about = "softplus decay"
    direct = ("conv1d", "forget_gate", "o_norm")

    def dims(self, layer: Any) -> Dims:
        return Dims(layer.num_heads, layer.num_heads, layer.head_dim, layer.head_dim)

    def project(self, layer: Any, x: Tensor) -> Projected:
        qkv = torch.cat((layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)), -1)
        heads = (*x.shape[:2], layer.num_heads, layer.head_dim)
        gate = layer.forget_gate
        g = gate(x).float() if own_call(gate) else self.decay(gate, x, heads)
        return Projected(qkv, g, layer.b_proj(x).sigmoid(), self.gate(layer, x).view(heads))

    def decay(self, gate: Any, x: Tensor, heads: tuple[int, ...]) -> Tensor:
        """What the forget gate computes: natural-log decay of shape `heads`, ``[B, T, H, K]``, in fp32."""
        raw = gate.f_b_proj(gate.f_a_proj(x)).float() + gate.dt_bias.float()
        return softplus_decay(gate.A_log, raw, heads)

    def gate(self, layer: Any, x: Tensor) -> Tensor:
        """Gate of the output norm ``[B, T, H V]``."""
        return layer.g_b_proj(layer.g_a_proj(x))

    def finish(self, layer: Any, o: Tensor, z: Tensor) -> Tensor:
        return layer.o_proj(gated_norm_fp32(layer.o_norm, o, z).flatten(2))


FAMILY = KimiLinear()
