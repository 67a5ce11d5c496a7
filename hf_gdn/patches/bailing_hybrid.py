"""Bailing-Hybrid: the layers of Kimi-Linear with full-rank gates; the decay is rounded to the model's dtype."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .kimi_linear import KimiLinear
from .parts import bounded_decay, softplus_decay


class BailingHybrid(KimiLinear):
    """The decay is bounded from below as in GLM-5-Next, or softplus, as the config says."""

    name = "bailing_hybrid"
    class_name = "BailingHybridDeltaAttention"

    def decay(self, layer: Any, x: Tensor) -> Tensor:
        gate = layer.forget_gate
        raw = gate.f_proj(x).float().view(*x.shape[:2], layer.num_heads, layer.head_dim)
        raw, A_log = raw + gate.dt_bias.view(layer.num_heads, layer.head_dim), gate.A_log.view(-1, 1)
        g = bounded_decay(A_log, raw, gate.lower_bound) if gate.safe_gate else softplus_decay(A_log, raw)
        return g.to(x.dtype).float()  # as transformers rounds it

    def gate(self, layer: Any, x: Tensor) -> Tensor:
        return layer.g_proj(x)


FAMILY = BailingHybrid()
