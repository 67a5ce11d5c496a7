"""Qwen3.5: Gated DeltaNet with one projection for q | k | v and one each for z, b and a."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels.contract import Projections
from .base import Family


class Qwen3_5(Family):
    """Differs from Qwen3-Next in the layout of the projections only."""

    name = "qwen3_5"
    class_name = "Qwen3_5GatedDeltaNet"
    model_name = "Qwen3_5TextModel"
    variant = "gdn"
    about = "text tower too"

    def project(self, layer: Any, x: Tensor) -> Projections:
        qkv = layer.in_proj_qkv(x)
        return self.split(layer, qkv, layer.in_proj_a(x), layer.in_proj_b(x), layer.in_proj_z(x))


FAMILY = Qwen3_5()
