"""The gated delta rule token by token, from flash-linear-attention."""

from __future__ import annotations

from ...registry import Kernel, register
from .runtime import adapt, why_not

for _op, _module, _name in (
    ("recurrent_gdn", "fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    ("recurrent_kda", "fla.ops.kda", "fused_recurrent_kda"),
):
    register(Kernel(_op, "fla", adapt(_module, _name, recurrent=True), why_not, checked=True))
