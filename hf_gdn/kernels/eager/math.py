"""Math shared by the eager kernels: norms, gates and the convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import ACTIVATIONS, LayerSpec, Projections, Weights


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension."""
    return x * torch.rsqrt(torch.linalg.vecdot(x, x) + 1e-6).unsqueeze(-1)


def activation(function: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function that a `LayerSpec` names, or the function itself."""
    return ACTIVATIONS[function] if isinstance(function, str) else function


def log_decay(spec: LayerSpec, weights: Weights, projected: Projections) -> Tensor:
    """Natural-log decay, ``[B, T, HV]`` or ``[B, T, HV, K]``, in fp32."""
    if projected.g is not None:
        return projected.g.float()
    assert projected.a is not None
    a, heads = projected.a, projected.v.shape[2] * projected.v.shape[3]
    per_channel = a.dim() == 3
    x = a.float() + weights.dt_bias.float().view(a.shape[2:])
    A = weights.A_log.float().exp().view((heads, 1) if per_channel else a.shape[2:])
    shape = (*a.shape[:2], heads, a.shape[2] // heads) if per_channel else (*a.shape[:2], heads)
    if spec.lower_bound is not None:
        g = spec.lower_bound * (A * x.view(shape)).sigmoid()
    elif per_channel:
        # softplus precedes the view: otherwise aot_autograd assumes wrong strides for its gradient.
        g = -A * F.softplus(x).view(shape)
    else:
        g = (-A * F.softplus(x)).reshape(shape)
    return g.to(projected.q.dtype).float() if spec.decay_in_dtype else g


def writing_strength(spec: LayerSpec, projected: Projections) -> Tensor:
    """beta ``[B, T, HV]`` in the model's dtype."""
    beta = projected.b.sigmoid().flatten(2)
    return beta if spec.beta_scale == 1.0 else beta * spec.beta_scale


def sigmoid_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(x) and its derivative; 1 - sigmoid(x) would lose the derivative where it is small. Both are new."""
    s = x.sigmoid()
    return s, (-x).sigmoid_().mul_(s)


def zero_padding(g: Tensor, beta: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, T, ...]`` of gates, or gradients of them, with zeros after the first `lengths` tokens of each row."""
    padding = torch.arange(g.shape[1], device=g.device) >= lengths[:, None]
    g = g.masked_fill(padding.view(*padding.shape, *[1] * (g.dim() - 2)), 0.0)
    return g, beta.masked_fill(padding[..., None], 0.0)


def packed_sequence(cu_seqlens: Tensor, length: int) -> Tensor:
    """Index of the packed sequence of each of `length` tokens."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(length, device=cu_seqlens.device), right=True)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, length: int, sequence: Tensor | None) -> Tensor:
    """Depthwise causal convolution as shifted multiply-adds, in fp32.

    Args:
        x: ``[B, L, C]``, L >= `length`; rows before the last `length` are left context.
        weight: ``[C, width]``; the last tap applies to the row itself.
        bias: ``[C]`` or None.
        length: number of output rows.
        sequence: ``[L]``, index of the packed sequence of each row, or None; taps do not reach into other sequences.

    Returns:
        ``[B, length, C]`` in fp32 (or float64).
    """
    width = weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, taps = x.to(dtype), weight.to(dtype).unbind(1)
    x = F.pad(x, (0, 0, max(0, width - 1 + length - x.shape[1]), 0))
    start = x.shape[1] - length
    out = x[:, start:] * taps[-1]
    for back in range(1, width):
        earlier = x[:, start - back : x.shape[1] - back]
        if sequence is not None:
            own = F.pad(sequence, (back, 0), value=-1)[: len(sequence)] == sequence
            earlier = earlier * own[-length:, None]
        out = (
            torch.addcmul(out, earlier, taps[-1 - back])
            if torch.is_grad_enabled()
            else out.addcmul_(earlier, taps[-1 - back])
        )
    return out if bias is None else out + bias.to(dtype)
