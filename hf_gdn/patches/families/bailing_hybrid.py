"""Bailing-Hybrid: the layers of Kimi-Linear with full-rank gates; the decay is rounded to the model's dtype."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels.contract import LayerSpec
from .kimi_linear import KimiLinear


class BailingHybrid(KimiLinear):
    """The config selects the decay: bounded from below as in GLM-5-Next, or softplus."""

    name = "bailing_hybrid"
    class_name = "BailingHybridDeltaAttention"
    model_name = "BailingHybridModel"
    about = "bounded decay or softplus, full-rank gates"
    cannot = (
        *((feature, why) for feature, why in KimiLinear.cannot if feature != "MTP"),
        ("MTP", "its head is a layer of the model's own kind, with latent attention"),
    )

    def spec(self, layer: Any) -> LayerSpec:
        gate = layer.forget_gate
        return (
            super().spec(layer)._replace(lower_bound=gate.lower_bound if gate.safe_gate else None, decay_in_dtype=True)
        )

    def forget(self, gate: Any, x: Tensor) -> Tensor:
        return gate.f_proj(x)

    def gate(self, layer: Any, x: Tensor) -> Tensor:
        return layer.g_proj(x)


FAMILY = BailingHybrid()
