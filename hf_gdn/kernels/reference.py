"""The oracle: the gated delta rule as a loop over tokens, in the inputs' own float dtype.

Per sequence and value head, with S of shape [K, V]:

    S <- diag(exp g_t) S ;  u = beta_t (v_t - S^T k_t) ;  S <- S + k_t u^T ;  o_t = scale * S^T q_t

It is written to be read, shares nothing with the kernels it judges, and is slow. Give it float64.
Source: Gated Delta Networks (arXiv 2412.06464), equation 10; Kimi Linear (arXiv 2510.26692), equation 1.
"""

from __future__ import annotations

import torch


def delta_rule(q, k, v, g, beta, *, scale, initial_state=None, cu_seqlens=None, qk_l2norm=False):
    """Gated delta rule, scalar or per-channel decay.

    Args:
        q, k: ``[B, T, HK, K]``.
        v: ``[B, T, HV, V]``, HV a multiple of HK; value head h reads key head ``h // (HV // HK)``.
        g: natural-log decay, ``[B, T, HV]`` (one per head) or ``[B, T, HV, K]`` (one per channel).
        beta: ``[B, T, HV]``.
        scale: factor on the output.
        initial_state: ``[N, HV, K, V]``, N the number of sequences; zeros when None.
        cu_seqlens: ``[N + 1]`` boundaries of N sequences packed along T (then B is 1).
        qk_l2norm: normalise q and k over K first, x / sqrt(sum x^2 + 1e-6).

    Returns:
        ``(o, final_state)``: ``[B, T, HV, V]`` and ``[N, HV, K, V]``, in v's dtype.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        outputs, states = [], []
        for n in range(len(bounds) - 1):
            part = slice(bounds[n], bounds[n + 1])
            state = None if initial_state is None else initial_state[n : n + 1]
            o, final = delta_rule(
                q[:, part], k[:, part], v[:, part], g[:, part], beta[:, part],
                scale=scale, initial_state=state, qk_l2norm=qk_l2norm,
            )  # fmt: skip
            outputs.append(o)
            states.append(final)
        return torch.cat(outputs, 1), torch.cat(states, 0)

    batch, length, k_heads, k_dim = q.shape
    v_heads, v_dim = v.shape[2:]
    group = v_heads // k_heads
    state = torch.zeros(batch, v_heads, k_dim, v_dim, dtype=v.dtype, device=v.device)
    if initial_state is not None:
        state = state + initial_state.to(v.dtype)
    if qk_l2norm:
        q = q / (q.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
        k = k / (k.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
    outputs = []
    for t in range(length):
        q_t = q[:, t].repeat_interleave(group, dim=1)
        k_t = k[:, t].repeat_interleave(group, dim=1)
        decay = g[:, t].to(v.dtype).exp()
        state = state * (decay[..., None, None] if g.dim() == 3 else decay[..., None])
        u = beta[:, t, :, None].to(v.dtype) * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k_t))
        state = state + k_t[..., :, None] * u[..., None, :]
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q_t))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state


def step(raw, weights, rule, window, state):
    """Everything between a layer's projections, for tokens that follow those of a cache. Give it float64.

    Args:
        raw, weights, rule: `hf_gdn.kernels.layer`; raw's tensors may be strided, a is given.
        window: ``[B, C, width]``, the last inputs of the convolution, oldest first.
        state: ``[B, HV, K, V]``.

    Returns:
        ``(y, window, state)``: ``[B, T, HV, V]``, and the two as they are afterwards; nothing is changed in place.
    """
    batch, length, k_heads, k_dim = raw.q.shape
    group, v_dim = raw.v.shape[3:]
    v_heads, width = k_heads * group, weights.conv.shape[1]
    x = torch.cat([part.reshape(batch, length, -1) for part in (raw.q, raw.k, raw.v)], -1)
    x = torch.cat([window.to(x.dtype), x.transpose(1, 2)], -1)  # [B, C, width + T]
    columns = []
    for t in range(length):
        taps = x[:, :, t + 1 : t + 1 + width]
        column = (taps * weights.conv).sum(-1)
        columns.append(column if weights.conv_bias is None else column + weights.conv_bias)
    qkv = torch.stack(columns, 1)
    qkv = qkv / (1 + torch.exp(-qkv))
    q, k, v = qkv.split([k_heads * k_dim, k_heads * k_dim, v_heads * v_dim], -1)
    per_channel = raw.a.dim() == 3
    a = raw.a.reshape(batch, length, v_heads, *([k_dim] if per_channel else []))
    a = a + weights.dt_bias.reshape(a.shape[2:])
    rate = weights.A_log.reshape(v_heads, *([1] if per_channel else [])).exp()
    g = -rate * torch.log1p(a.exp()) if rule.lower_bound is None else rule.lower_bound / (1 + torch.exp(-rate * a))
    beta = rule.beta_scale / (1 + torch.exp(-raw.b.reshape(batch, length, v_heads)))
    o, state = delta_rule(
        q.reshape(batch, length, k_heads, k_dim), k.reshape(batch, length, k_heads, k_dim),
        v.reshape(batch, length, v_heads, v_dim), g, beta, scale=k_dim**-0.5, initial_state=state, qk_l2norm=True,
    )  # fmt: skip
    z = raw.z.reshape(batch, length, v_heads, v_dim)
    gate = 1 / (1 + torch.exp(-z)) * (z if rule.gate == "silu" else 1)
    y = o / (o.pow(2).mean(-1, keepdim=True) + rule.eps).sqrt() * weights.norm * gate
    return y, x[:, :, -window.shape[2] :], state
