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
    model_name = "BailingHybridModel"
    about = "bounded decay or softplus, full-rank gates"
    cannot = (("transformers 5.17", "5.17 has no such model"),)

    def decay(self, gate: Any, x: Tensor, heads: tuple[int, ...]) -> Tensor:
        raw, A_log = gate.f_proj(x).float() + gate.dt_bias.float(), gate.A_log.view(-1, 1)
        if gate.safe_gate:
            g = bounded_decay(A_log, raw.view(heads), gate.lower_bound)
        else:
            g = softplus_decay(A_log, raw, heads)
        return g.to(x.dtype).float()  # as transformers rounds it

    def gate(self, layer: Any, x: Tensor) -> Tensor:
        return layer.g_proj(x)


FAMILY = BailingHybrid()
