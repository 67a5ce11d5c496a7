"""The gated output norm of a layer, for whole sequences: the last compiled function of a prefill.

    y = norm(o) gate(z) ,  norm(o) = o / sqrt(mean o^2 + eps) * weight

The oracle is `hf_gdn.kernels.reference.gated_norm`. z is a view of the projection's output, in the family's layout.
If the weight is applied in the model's dtype (Qwen3-Next), the norm is rounded before and after it; otherwise it stays
in fp32 (Kimi-Linear).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import LayerSpec, state_dtype
from .arguments import LANES, NORM_BLOCK, padded
from .runtime import launch, why_not


def gated_norm(o: Tensor, z: Tensor, weight: Tensor, spec: LayerSpec) -> Tensor:
    """RMS norm of o, gated by z, without gradients. All arithmetic is fp32 (float64), except where the model rounds.

    Args:
        o: ``[B, T, HV, V]`` in fp16, bf16, fp32 or float64.
        z: ``[B, T, HK, R, V]`` in o's dtype, R = HV / HK, contiguous in V.
        weight: ``[V]`` in any float dtype.
        spec: gate must be silu or sigmoid.

    Returns:
        ``[B, T, HV, V]`` in o's dtype, contiguous.
    """
    o = o.contiguous()
    y = torch.empty_like(o)
    rows, (HV, V) = o.shape[:3].numel(), o.shape[2:]
    launch(
        "gated_norm",
        state_dtype(o.dtype),
        -(-rows // NORM_BLOCK),
        o.numel(),
        3 * padded(V) + LANES,
        (o, z, weight, y),
        rows, o.shape[1], HV, z.shape[3], V, spec.norm_in_fp32, spec.gate == "silu", spec.eps,
    )  # fmt: skip
    return y


register(Kernel("gated_norm", "numba", gated_norm, why_not, fast_on=("cpu",)))
