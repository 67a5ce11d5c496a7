"""Kimi-Linear: Kimi delta attention, separate projections, low-rank forget gate and output gate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels.contract import LayerSpec, Projections
from .base import Dims, Family, has_hooks


class KimiLinear(Family):
    """The decay is -exp(A_log) softplus(f_b(f_a(x)) + dt_bias), one per key channel, without a bound."""

    name = "kimi_linear"
    class_name = "KimiLinearDeltaAttention"
    model_name = "KimiLinearModel"
    variant = "kda"
    about = "softplus decay"
    cannot: tuple[tuple[str, str], ...] = (
        (
            "continuous batching",
            "the paged cache of transformers has no room for the compressed vectors of its latent attention",
        ),
        ("MTP", "its checkpoints have no such head"),
    )
    norm_name, output_name = "o_norm", "o_proj"
    direct = ("conv1d", "forget_gate", "o_norm")

    def dims(self, layer: Any) -> Dims:
        return Dims(layer.num_heads, layer.num_heads, layer.head_dim, layer.head_dim)

    def decays(self, layer: Any) -> Any:
        return layer.forget_gate

    def project(self, layer: Any, x: Tensor) -> Projections:
        qkv, gate = (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)), layer.forget_gate
        called = has_hooks(gate)
        a = gate(x) if called else self.forget(gate, x)
        projected = self.split(layer, qkv, a, layer.b_proj(x), self.gate(layer, x))
        return projected._replace(a=None, g=a) if called else projected

    def spec(self, layer: Any) -> LayerSpec:
        return super().spec(layer)._replace(norm_in_fp32=True)

    def forget(self, gate: Any, x: Tensor) -> Tensor:
        """Projection of the forget gate, ``[B, T, H K]``."""
        return gate.f_b_proj(gate.f_a_proj(x))

    def gate(self, layer: Any, x: Tensor) -> Tensor:
        """Gate of the output norm ``[B, T, H V]``."""
        return layer.g_b_proj(layer.g_a_proj(x))


FAMILY = KimiLinear()
