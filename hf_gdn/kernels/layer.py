"""What lies between a layer's projections, in plain PyTorch: convolution, gates, gated norm; and the names for it.

    q, k, v <- silu(conv(q | k | v)) ;  q, k <- l2norm ;  g, beta <- gates(a, b)        `prologue`
    o <- delta rule                                                                  `hf_gdn.kernels.eager`
    y <- norm(o) gate(z)                                                             `gated_norm`

`step` is all three for the next few tokens of a cache. Everything is seen as the projections leave it: `Raw` holds
views, whatever their strides. q, k, v and o are rounded to the model's dtype, once each, beta as transformers rounds
it; the rest is fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Kernel, register
from .contract import ACTIVATIONS, Prepared, Raw, Rule, Weights, state_dtype
from .eager import l2norm, recurrent, why_not, without_autocast


def activation(function: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What a `Rule` names."""
    return ACTIVATIONS[function] if isinstance(function, str) else function


def decay(rule: Rule, weights: Weights, raw: Raw) -> Tensor:
    """Natural-log decay, ``[B, T, HV]`` or ``[B, T, HV, K]``, in fp32."""
    if raw.g is not None:
        return raw.g.float()
    assert raw.a is not None
    a, heads = raw.a, raw.v.shape[2] * raw.v.shape[3]
    per_channel = a.dim() == 3
    x = a.float() + weights.dt_bias.float().view(a.shape[2:])
    A = weights.A_log.float().exp().view((heads, 1) if per_channel else a.shape[2:])
    shape = (*a.shape[:2], heads, -1) if per_channel else (*a.shape[:2], heads)
    if rule.lower_bound is not None:
        g = rule.lower_bound * (A * x.view(shape)).sigmoid()
    elif per_channel:
        g = -A * F.softplus(x).view(shape)  # before the view: aot_autograd takes its gradient's strides for others
    else:
        g = (-A * F.softplus(x)).reshape(shape)
    return g.to(raw.q.dtype).float() if rule.decay_in_dtype else g


def beta(rule: Rule, raw: Raw) -> Tensor:
    """Writing strength ``[B, T, HV]`` in the model's dtype."""
    strength = raw.b.sigmoid().flatten(2)
    return strength if rule.beta_scale == 1.0 else strength * rule.beta_scale


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, length: int, sequence: Tensor | None) -> Tensor:
    """Depthwise causal convolution as shifted multiply-adds, in fp32.

    Args:
        x: ``[B, L, C]``, L >= `length`; what comes before its last `length` rows is left context.
        weight: ``[C, width]``; its last tap meets the row itself.
        bias: ``[C]`` or None.
        length: rows wanted.
        sequence: ``[L]``, which packed sequence a row belongs to: taps do not reach into another one. Or None.

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


@without_autocast
def prologue(
    raw: Raw, weights: Weights, rule: Rule, *,
    window: Tensor | None = None, keep: int = 0, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None,
) -> Prepared:  # fmt: skip
    """Everything before the delta rule.

    Args:
        raw: of tokens ``[B, T]``.
        weights: the convolution's and the gates'.
        rule: its gates and its activation.
        window: left context, the last inputs of the convolution: ``[B, C, keep]`` in raw's dtype; zeros when None. It
            is not written to. Packed sequences do not see it.
        keep: columns of the window that is returned, which ends at each row's last token; 0 for none.
        cu_seqlens: ``[N + 1]`` boundaries of sequences packed along T, B = 1: the convolution stays inside each.
        lengths: ``[B]``, how many tokens a row has; those after them are padding, which neither decays nor writes.
    """
    qkv = raw.joined()
    batch, length, k_heads, k_dim = raw.q.shape
    group, v_dim = raw.v.shape[3:]
    x, recent, sequence = qkv.transpose(1, 2), None, None
    if keep:
        x = F.pad(x, (keep, 0)) if window is None else torch.cat((window, x), -1)
    g, strength = decay(rule, weights, raw), beta(rule, raw).to(state_dtype(qkv.dtype))
    if lengths is not None:
        padding = torch.arange(length, device=qkv.device) >= lengths[:, None]
        g = g.masked_fill(padding.view(batch, length, *[1] * (g.dim() - 2)), 0.0)
        strength = strength.masked_fill(padding[..., None], 0.0)
    if keep and lengths is not None:
        columns = lengths[:, None] + torch.arange(keep, device=qkv.device)
        recent = x.gather(2, columns[:, None].expand(-1, x.shape[1], -1))
    elif keep:
        recent = x[..., -keep:].contiguous()
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(length, device=qkv.device), right=True)
    out = causal_conv(x.transpose(1, 2), weights.conv, weights.conv_bias, length, sequence)
    sizes = (k_heads * k_dim, k_heads * k_dim, k_heads * group * v_dim)
    q, k, v = activation(rule.activation)(out).split_with_sizes(sizes, -1)
    q, k = (l2norm(x.unflatten(2, (k_heads, k_dim))).to(qkv.dtype) for x in (q, k))
    return Prepared(q, k, v.to(qkv.dtype).unflatten(2, (k_heads * group, v_dim)), g, strength, recent)


def gated_norm(o: Tensor, z: Tensor, weight: Tensor, rule: Rule) -> Tensor:
    """RMS norm of o, gated by z.

    Args:
        o: ``[B, T, HV, V]``, contiguous.
        z: ``[B, T, HK, R, V]`` in o's dtype, strided in all but V.
        weight: ``[V]``.
        rule: its gate, eps, and where the weight is applied.

    Returns:
        ``[B, T, HV, V]`` in o's dtype.
    """
    z = z.reshape(o.shape)
    if rule.norm_in_fp32:
        y = F.rms_norm(o.float(), o.shape[-1:], weight.float(), rule.eps)
    else:
        y = weight * F.rms_norm(o.float(), o.shape[-1:], eps=rule.eps).to(o.dtype)
    return (y * activation(rule.gate)(z.float())).to(z.dtype)


def step(raw: Raw, weights: Weights, rule: Rule, window: Tensor, state: Tensor) -> Tensor:
    """All of this for the next few tokens of a cache, which moves on in place: the eager backend's step.

    Args:
        raw: of tokens ``[B, T]``; a is given.
        weights: norm is given.
        rule: its activation is silu, its gate one of `ACTIVATIONS`.
        window: the last inputs of the convolution, ``[B, C, width]``, in raw's dtype.
        state: ``[B, HV, K, V]``, contiguous, in fp32 (float64 for float64).

    Returns:
        ``[B, T, HV, V]`` in raw's dtype, normed and gated.
    """
    batch, length, k_heads, k_dim = raw.q.shape
    v_heads, v_dim = k_heads * raw.v.shape[3], raw.v.shape[4]
    qkv = raw.joined()
    size, width = window.shape[2], weights.conv.shape[1]
    x = torch.cat((window, qkv.transpose(1, 2)), -1)
    if length == 1:
        dtype = torch.promote_types(x.dtype, torch.float32)
        out = torch.linalg.vecdot(x.narrow(2, size + 1 - width, width).to(dtype), weights.conv.to(dtype)).unsqueeze(1)
        out = out if weights.conv_bias is None else out + weights.conv_bias.to(dtype)
    else:
        out = causal_conv(x.transpose(1, 2), weights.conv, weights.conv_bias, length, None)
    q, k, v = F.silu(out).to(qkv.dtype).split_with_sizes((k_heads * k_dim, k_heads * k_dim, v_heads * v_dim), -1)
    o, _ = recurrent(
        q.view(batch, length, k_heads, k_dim), k.view(batch, length, k_heads, k_dim),
        v.view(batch, length, v_heads, v_dim), decay(rule, weights, raw), beta(rule, raw),
        scale=k_dim**-0.5, initial_state=state, qk_l2norm=True, inplace=True,
    )  # fmt: skip
    window.copy_(x.narrow(2, x.shape[2] - size, size))  # right after the state: nothing in between can fail
    assert weights.norm is not None
    return gated_norm(o, raw.z, weights.norm, rule)


for _rule in ("gdn", "kda"):
    register(Kernel(f"prologue_{_rule}", "eager", prologue, why_not, differentiable=True, traceable=True))
    register(Kernel(f"step_{_rule}", "eager", step, why_not, traceable=True))
register(Kernel("gated_norm", "eager", gated_norm, why_not, differentiable=True, traceable=True))
