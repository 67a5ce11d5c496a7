"""Qwen3-Next: Gated DeltaNet with one projection for q, k, v, z and one for b, a, both interleaved per key head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels.contract import Projections
from .base import Family


class Qwen3Next(Family):
    """Per key head, ``in_proj_qkvz`` is q | k | v | z, v and z of all its value heads, and ``in_proj_ba`` is b | a."""

    name = "qwen3_next"
    class_name = "Qwen3NextGatedDeltaNet"
    model_name = "Qwen3NextModel"
    variant = "gdn"
    about = "projections interleaved per key head"

    def project(self, layer: Any, x: Tensor) -> Projections:
        k_heads, v_heads, k_dim, v_dim = self.dims(layer)
        group = v_heads // k_heads
        per_head = layer.in_proj_qkvz(x).unflatten(2, (k_heads, -1))
        q, k, v, z = per_head.split_with_sizes((k_dim, k_dim, group * v_dim, group * v_dim), -1)
        b, a = layer.in_proj_ba(x).unflatten(2, (k_heads, 2, group)).unbind(3)
        return Projections(q, k, v.unflatten(3, (group, v_dim)), a, b, z.unflatten(3, (group, v_dim)))


FAMILY = Qwen3Next()
