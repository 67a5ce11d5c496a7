"""The gradients of everything before the delta rule, in plain PyTorch.

With s the convolution of x, y = silu(s), n = y r, r = 1 / sqrt(sum y^2 + 1e-6), and X' the gradient of X:

    y' = r (n' - n sum(n' n)) for q and k, given for v ;  s' = y' silu'(s)
    x'_t = sum over i of w_i s'_(t + width - 1 - i) ;  w'_i = sum over t of s'_t x_(t - width + 1 + i)

The oracle is autograd through `hf_gdn.kernels.reference.prologue`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...registry import Kernel, register
from ..contract import LayerSpec, Projections, PrologueGradients, Weights
from .math import causal_conv, packed_sequence, sigmoid_and_slope, zero_padding
from .runtime import why_not, without_autocast


def _convolution_backward(x: Tensor, weight: Tensor, d_s: Tensor, sequence: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x ``[B, T, C]`` and of the weight ``[C, width]``; `sequence` as in `causal_conv`."""
    length, width = x.shape[1], weight.shape[1]
    taps = weight.to(d_s.dtype).unbind(1)
    d_x, d_taps = d_s * taps[-1], [(d_s * x).sum((0, 1))]
    for back in range(1, width):
        later, earlier = d_s[:, back:], x[:, : max(length - back, 0)]
        if sequence is not None:
            later = later * (sequence[back:] == sequence[: max(length - back, 0)])[:, None]
        d_x[:, : max(length - back, 0)].addcmul_(later, taps[-1 - back])
        d_taps.append((later * earlier).sum((0, 1)))
    return d_x, torch.stack(d_taps[::-1], 1)


def _gates_backward(
    projected: Projections, weights: Weights, spec: LayerSpec, d_g: Tensor, d_beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, b, A_log and dt_bias."""
    a, dtype = projected.decay_by_head(), d_g.dtype
    of_gates = a.shape[2:]
    _, slope = sigmoid_and_slope(projected.b.to(dtype))
    d_b = slope.mul_(d_beta.view(slope.shape)).mul_(spec.beta_scale)
    x = a.to(dtype) + weights.dt_bias.to(dtype).view(of_gates)
    rate = weights.A_log.to(dtype).exp().view(*of_gates[:2], *[1] * (len(of_gates) - 2))
    d_g = d_g.view(a.shape)
    if spec.lower_bound is None:
        d_a = x.sigmoid().mul_(-rate).mul_(d_g)
        d_A_log = F.softplus(x).mul_(-rate).mul_(d_g)
    else:
        _, slope = sigmoid_and_slope(rate * x)
        d_a = slope.mul_(rate * spec.lower_bound).mul_(d_g)
        d_A_log = d_a * x
    heads = d_A_log.flatten(4).sum(-1) if len(of_gates) > 2 else d_A_log
    return d_a, d_b, heads.sum((0, 1)), d_a.sum((0, 1))


@without_autocast
def backward_prologue(
    projected: Projections,
    weights: Weights,
    spec: LayerSpec,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_g: Tensor,
    d_beta: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> PrologueGradients:
    """Gradients of everything before the delta rule, in fp32 (float64), without the forward's roundings.

    Args:
        projected, weights, spec, cu_seqlens, lengths: as in `prologue`; activation must be silu, and a given.
        d_q, d_k, d_v, d_g, d_beta: gradients of its results, in their shapes and dtypes.
    """
    qkv, a = projected.joined(), projected.a
    assert a is not None
    length, dtype = qkv.shape[1], torch.promote_types(qkv.dtype, torch.float32)
    sequence = None if cu_seqlens is None else packed_sequence(cu_seqlens, length)
    x = qkv.to(dtype)
    s = causal_conv(x, weights.conv, weights.conv_bias, length, sequence)
    d_s = s.sigmoid()
    y = s.mul_(d_s)
    d_s = d_s.add_(y * (1 - d_s))  # silu'
    sizes = [d.shape[2:].numel() for d in (d_q, d_k, d_v)]
    parts = zip(y.split_with_sizes(sizes, -1), d_s.split_with_sizes(sizes, -1), (d_q, d_k, d_v))
    for i, (of_y, of_s, d) in enumerate(parts):
        if i < 2:
            heads, d = of_y.unflatten(2, d.shape[2:]), d.to(dtype)
            scale = torch.rsqrt(torch.linalg.vecdot(heads, heads) + 1e-6).unsqueeze(-1)
            n = heads * scale
            d = (d - n * torch.linalg.vecdot(n, d).unsqueeze(-1)).mul_(scale)
        of_s.mul_(d.flatten(2))
    d_x, d_conv = _convolution_backward(x, weights.conv, d_s, sequence)
    if lengths is not None:
        d_g, d_beta = zero_padding(d_g, d_beta, lengths)
    d_a, d_b, d_A_log, d_dt_bias = _gates_backward(projected, weights, spec, d_g, d_beta)
    return PrologueGradients(
        qkv=d_x.to(qkv.dtype),
        a=d_a.to(a.dtype).view(a.shape),
        b=d_b.to(projected.b.dtype),
        conv=d_conv.to(weights.conv.dtype),
        A_log=d_A_log.to(weights.A_log.dtype).view(weights.A_log.shape),
        dt_bias=d_dt_bias.to(weights.dt_bias.dtype).view(weights.dt_bias.shape),
        conv_bias=None if weights.conv_bias is None else d_s.sum((0, 1)).to(weights.conv_bias.dtype),
    )


for _op in ("backward_prologue_gdn", "backward_prologue_kda"):
    register(Kernel(_op, "eager", backward_prologue, why_not, fast_on=("cpu",)))
