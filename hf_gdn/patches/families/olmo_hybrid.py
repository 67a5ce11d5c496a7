"""OLMo-Hybrid: Gated DeltaNet with separate projections and beta up to 2; K and V differ and are no powers of two."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels.contract import LayerSpec, Projections
from .base import Family


class OlmoHybrid(Family):
    """Beta is doubled if the config allows negative eigenvalues."""

    name = "olmo_hybrid"
    class_name = "OlmoHybridGatedDeltaNet"
    model_name = "OlmoHybridModel"
    variant = "gdn"
    about = "β up to 2, K ≠ V"
    cannot = (("MTP", "its checkpoints have no such head"),)
    norm_name, output_name = "o_norm", "o_proj"

    def project(self, layer: Any, x: Tensor) -> Projections:
        qkv = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
        return self.split(layer, qkv, layer.a_proj(x), layer.b_proj(x), layer.g_proj(x))

    def spec(self, layer: Any) -> LayerSpec:
        return super().spec(layer)._replace(beta_scale=2.0 if layer.allow_neg_eigval else 1.0)


FAMILY = OlmoHybrid()
