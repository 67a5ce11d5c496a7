"""The gradients of the gated output norm, in plain PyTorch.

With n = o r, r = 1 / sqrt(mean o^2 + eps), and X' the gradient of X:

    n' = y' gate(z) w ;  o' = r (n' - n mean(n' n)) ;  z' = y' n w gate'(z) ;  w' = sum over rows of y' gate(z) n

The oracle is autograd through `hf_gdn.kernels.reference.gated_norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import LayerSpec, NormGradients
from .math import sigmoid_and_slope
from .runtime import why_not, without_autocast


@without_autocast
def backward_gated_norm(o: Tensor, z: Tensor, weight: Tensor, d_y: Tensor, spec: LayerSpec) -> NormGradients:
    """Gradients of the gated norm, in fp32 (float64), without the forward's roundings.

    Args:
        o, z, weight: as in `gated_norm`.
        d_y: ``[B, T, HV, V]``, the gradient of its result.
        spec: gate must be silu or sigmoid.
    """
    dtype = torch.promote_types(o.dtype, torch.float32)
    x, d, w, gate_input = (y.to(dtype) for y in (o, d_y, weight, z.reshape(o.shape)))
    length = torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.eps)
    n = x * length
    gate, slope = sigmoid_and_slope(gate_input)
    if spec.gate == "silu":
        slope = slope.mul_(gate_input).add_(gate)
        gate = gate.mul_(gate_input)
    d_z = slope.mul_(d).mul_(n).mul_(w)
    d_n = gate.mul_(d)
    d_weight = (d_n * n).sum((0, 1, 2))
    d_n.mul_(w)
    d_o = d_n.sub_(n * (torch.linalg.vecdot(d_n, n) / n.shape[-1]).unsqueeze(-1)).mul_(length)
    return NormGradients(d_o.to(o.dtype), d_z.to(z.dtype).view(z.shape), d_weight.to(weight.dtype))


register(Kernel("backward_gated_norm", "eager", backward_gated_norm, why_not, fast_on=("cpu",)))
