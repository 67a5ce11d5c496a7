"""What lies between a layer's projections, in plain PyTorch: convolution, gates, gated norm; and the names for it.

    q, k, v <- silu(conv(q | k | v)) ;  q, k <- l2norm ;  g, beta <- gates(a, b) ;  o <- delta rule
    y <- norm(o) gate(z)

Everything is seen as the projections leave it: `Raw` holds views, whatever their strides. Rounding follows
transformers': q, k, v after their activation, beta and o are in the model's dtype, the rest is fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Kernel, register
from .eager import recurrent, why_not

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


class Raw(NamedTuple):
    """What a layer's projections make of hidden states ``[B, T, hidden]``; R = HV / HK value heads to a key head.

    The last dimension of q, k, v, z and of KDA's a is contiguous.
    """

    q: Tensor  # [B, T, HK, K], before the convolution
    k: Tensor  # [B, T, HK, K]
    v: Tensor  # [B, T, HK, R, V]
    a: Tensor | None  # [B, T, HK, R] (GDN) or [B, T, HV K] (KDA), before bias and gate; None where g is given
    b: Tensor  # [B, T, HK, R], before the sigmoid
    z: Tensor  # [B, T, HK, R, V], gate of the output norm
    qkv: Tensor | None = None  # [B, T, C], q | k | v, where a projection gives it
    g: Tensor | None = None  # [B, T, HV, K], from a forget gate that had to be called

    def joined(self) -> Tensor:
        """q | k | v side by side, ``[B, T, C]``."""
        if self.qkv is not None:
            return self.qkv
        return torch.cat((self.q.flatten(2), self.k.flatten(2), self.v.flatten(2)), -1)


class Weights(NamedTuple):
    """The parameters that are used here, in any float dtype."""

    conv: Tensor  # [C, width]
    conv_bias: Tensor | None  # [C]
    A_log: Tensor  # [HV] elements
    dt_bias: Tensor  # [HV] or, for KDA, [HV K] elements
    norm: Tensor | None  # [V]; None where the norm has to be called


class Rule(NamedTuple):
    """What differs between families.

    Args:
        lower_bound: the decay is ``lower_bound sigmoid(exp(A_log) a)`` rather than ``-exp(A_log) softplus(a)``.
        decay_in_dtype: the decay is rounded to the model's dtype.
        beta_scale: factor on beta.
        activation: of the convolution.
        gate: activation of the norm's gate, ``"silu"`` or ``"sigmoid"``.
        norm_in_fp32: the norm's weight is applied in fp32, else in the model's dtype, after rounding.
        eps: of the norm.
    """

    lower_bound: float | None = None
    decay_in_dtype: bool = False
    beta_scale: float = 1.0
    activation: str = "silu"
    gate: str = "silu"
    norm_in_fp32: bool = False
    eps: float = 1e-6


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


def gated_norm(
    rule: Rule, weight: Tensor, o: Tensor, z: Tensor, gate: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """RMS norm of o ``[..., V]`` gated by z of the same shape; `gate` where the rule's is not one of `ACTIVATIONS`."""
    gate = gate or ACTIVATIONS[rule.gate]
    if rule.norm_in_fp32:
        o = F.rms_norm(o.float(), o.shape[-1:], weight.float(), rule.eps)
    else:
        o = weight * F.rms_norm(o.float(), o.shape[-1:], eps=rule.eps).to(o.dtype)
    return (o * gate(z.float())).to(z.dtype)


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
    return gated_norm(rule, weights.norm, o, raw.z.reshape(o.shape))


for _op in ("step_gdn", "step_kda"):
    register(Kernel(_op, "eager", step, why_not, traceable=True))
