"""GLM-5-Next: the layers of Kimi-Linear; the forget gate is bounded from below unless the config says otherwise."""

from __future__ import annotations

from typing import Any

from ...kernels.contract import LayerSpec
from .kimi_linear import KimiLinear


class Glm5Next(KimiLinear):
    """The decay is lower_bound sigmoid(exp(A_log) (f_b(f_a(x)) + dt_bias)), one per key channel."""

    name = "glm5_next"
    class_name = "Glm5NextTextLinearAttention"
    model_name = "Glm5NextTextModel"
    masks_always = True
    about = "bounded decay or softplus; text tower"
    cannot = (
        ("padding inside a row", "its full attention pools neighbouring keys, padding included"),
        ("packed by `position_ids`", "its full attention attends across sequence boundaries"),
        ("CUDA graphs", "the indexer of its full attention reads the set of valid keys back from the device"),
        ("continuous batching", "the paged cache of transformers does not know indexed attention"),
        ("MTP", "its head is a layer with an indexer, which no head here has"),
    )

    def spec(self, layer: Any) -> LayerSpec:
        return super().spec(layer)._replace(lower_bound=layer.forget_gate.safe_gate_lower_bound)


FAMILY = Glm5Next()
