"""The gated output norm of a layer, in plain PyTorch: y = norm(o) gate(z).

The oracle is `hf_gdn.kernels.reference.gated_norm`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...registry import Kernel, register
from ..contract import LayerSpec
from .math import activation
from .runtime import why_not


def gated_norm(o: Tensor, z: Tensor, weight: Tensor, spec: LayerSpec) -> Tensor:
    """RMS norm of o, gated by z.

    Args:
        o: ``[B, T, HV, V]``, contiguous.
        z: ``[B, T, HK, R, V]`` in o's dtype, strided in all but V.
        weight: ``[V]``.
        spec: `gate`, `eps` and `norm_in_fp32` are used.

    Returns:
        ``[B, T, HV, V]`` in o's dtype.
    """
    z = z.reshape(o.shape)
    if spec.norm_in_fp32:
        y = F.rms_norm(o.float(), o.shape[-1:], weight.float(), spec.eps)
    else:
        y = weight * F.rms_norm(o.float(), o.shape[-1:], eps=spec.eps).to(o.dtype)
    return (y * activation(spec.gate)(z.float())).to(z.dtype)


register(Kernel("gated_norm", "eager", gated_norm, why_not, differentiable=True, traceable=True))
