"""GLM-5-Next: the layers of Kimi-Linear, with a forget gate that is bounded from below unless the config says not."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .kimi_linear import KimiLinear
from .parts import bounded_decay, softplus_decay


class Glm5Next(KimiLinear):
    """The decay is lower_bound sigmoid(exp(A_log) (f_b(f_a(x)) + dt_bias)), one per key channel."""

    name = "glm5_next"
    class_name = "Glm5NextTextLinearAttention"
    model_name = "Glm5NextTextModel"
    about = "bounded decay or softplus; text tower"
    cannot = (("packed by `position_ids`", "its full attention reads on across a restart"),)

    def decay(self, gate: Any, x: Tensor, heads: tuple[int, ...]) -> Tensor:
        raw, A_log = gate.f_b_proj(gate.f_a_proj(x)).float() + gate.dt_bias.float(), gate.A_log.view(-1, 1)
        bound = gate.safe_gate_lower_bound
        return softplus_decay(A_log, raw, heads) if bound is None else bounded_decay(A_log, raw.view(heads), bound)


FAMILY = Glm5Next()
