"""The oracle: the gated delta rule as a loop over tokens, in the inputs' own float dtype.

Per sequence and value head, with S of shape [K, V]:

    S <- diag(exp g_t) S ;  u = beta_t (v_t - S^T k_t) ;  S <- S + k_t u^T ;  o_t = scale * S^T q_t

It is slow, written for readability, and shares no code with the kernels that it tests. Call it with float64 inputs.
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
        qk_l2norm: L2-normalise q and k over K first, x / sqrt(sum x^2 + 1e-6).

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
                q[:, part],
                k[:, part],
                v[:, part],
                g[:, part],
                beta[:, part],
                scale=scale,
                initial_state=state,
                qk_l2norm=qk_l2norm,
            )
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


def delta_rule_backward(q, k, v, g, beta, d_o, d_final_state, *, initial_state=None, **options):
    """Gradients of `delta_rule`, by autograd.

    Args:
        d_o, d_final_state: gradients of its results.

    Returns:
        Gradients of q, k, v, g, beta and the initial state (None if there is none).
    """
    given = [x.detach().requires_grad_() for x in (q, k, v, g, beta)]
    if initial_state is not None:
        given.append(initial_state.detach().requires_grad_())
    with torch.enable_grad():
        o, state = delta_rule(*given[:5], initial_state=given[5] if len(given) > 5 else None, **options)
        # Of sequences without tokens, results do not depend on all inputs.
        results = [(x, d) for x, d in ((o, d_o), (state, d_final_state)) if x.requires_grad]
        if not results:
            return (*map(torch.zeros_like, given), None)
        outputs, gradients = zip(*results)
        found = torch.autograd.grad(outputs, given, gradients, allow_unused=True, materialize_grads=True)
    return (*found, *[None] * (6 - len(found)))


def prologue(projected, weights, spec, *, conv_state=None, keep=0, cu_seqlens=None, lengths=None):
    """Everything between a layer's input projections and the delta rule. Call it with float64 inputs.

    Args:
        projected, weights, spec: see `hf_gdn.kernels.contract`. Tensors may be strided; a must be given and the
            activation must be silu.
        conv_state: ``[B, C, keep]``, the last inputs of the convolution before these tokens, oldest first; zeros when
            None.
        keep: columns of the convolution state that is returned.
        cu_seqlens: ``[N + 1]`` boundaries of N sequences packed along T (then B is 1), which do not read conv_state.
        lengths: ``[B]``, number of tokens in each row; padding follows them.

    Returns:
        ``(q, k, v, g, beta, conv_state)``: q, k ``[B, T, HK, K]``, normalised; v ``[B, T, HV, V]``; g ``[B, T, HV]`` or
        ``[B, T, HV, K]``, beta ``[B, T, HV]``; the last `keep` inputs of every row, ``[B, C, keep]``, or None.
    """
    batch, length, k_heads, k_dim = projected.q.shape
    group, v_dim = projected.v.shape[3:]
    v_heads, width = k_heads * group, weights.conv.shape[1]
    x = torch.cat([part.reshape(batch, length, -1) for part in (projected.q, projected.k, projected.v)], -1)
    before = x.new_zeros(batch, keep, x.shape[2]) if conv_state is None else conv_state.to(x.dtype).transpose(1, 2)
    qkv = torch.zeros_like(x)
    starts = [0] if cu_seqlens is None else cu_seqlens.tolist()
    for t in range(length):
        start = max(s for s in starts if s <= t)
        for i in range(width):  # i tokens back
            if t - i >= start:
                tap = x[:, t - i]
            elif cu_seqlens is None and t - i + before.shape[1] >= 0:
                tap = before[:, t - i]
            else:
                continue
            qkv[:, t] += tap * weights.conv[:, width - 1 - i]
    if weights.conv_bias is not None:
        qkv = qkv + weights.conv_bias
    qkv = qkv / (1 + torch.exp(-qkv))
    q, k, v = qkv.split([k_heads * k_dim, k_heads * k_dim, v_heads * v_dim], -1)
    q, k = (y.reshape(batch, length, k_heads, k_dim) for y in (q, k))
    q, k = (y / (y.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    per_channel = projected.a.dim() == 3
    a = projected.a.reshape(batch, length, v_heads, *([k_dim] if per_channel else []))
    a = a + weights.dt_bias.reshape(a.shape[2:])
    rate = weights.A_log.reshape(v_heads, *([1] if per_channel else [])).exp()
    g = -rate * torch.log1p(a.exp()) if spec.lower_bound is None else spec.lower_bound / (1 + torch.exp(-rate * a))
    beta = spec.beta_scale / (1 + torch.exp(-projected.b.reshape(batch, length, v_heads)))
    ends = [length] * batch if lengths is None else lengths.tolist()
    recent = None if keep == 0 else torch.empty(batch, x.shape[2], keep, dtype=x.dtype)
    for row, end in enumerate(ends):
        g[row, end:] = 0
        beta[row, end:] = 0
        if recent is not None:
            recent[row] = torch.cat([before[row], x[row, :end]])[-keep:].T
    return q, k, v.reshape(batch, length, v_heads, v_dim), g, beta, recent


def gated_norm(o, z, weight, spec):
    """RMS norm of o ``[B, T, HV, V]``, gated by z ``[B, T, HK, R, V]``. Returns ``[B, T, HV, V]``."""
    z = z.reshape(o.shape)
    gate = 1 / (1 + torch.exp(-z)) * (z if spec.gate == "silu" else 1)
    return o / (o.pow(2).mean(-1, keepdim=True) + spec.eps).sqrt() * weight * gate


def prologue_backward(projected, weights, spec, d_q, d_k, d_v, d_g, d_beta, **options):
    """Gradients of `prologue` without a convolution state, by autograd.

    Args:
        d_q, d_k, d_v, d_g, d_beta: gradients of its results.

    Returns:
        Gradients of q | k | v ``[B, T, C]``, a, b, the weight of the convolution, A_log, dt_bias and the bias of the
        convolution (None if there is none).
    """
    batch, length = projected.q.shape[:2]
    given = [x.detach().requires_grad_() for x in projected[:5]]
    held = [None if x is None else x.detach().requires_grad_() for x in weights[:4]]
    with torch.enable_grad():
        changed = projected._replace(**dict(zip("qkvab", given)))
        made = prologue(changed, weights._replace(**dict(zip(weights._fields, held))), spec, **options)[:5]
        wanted = [*given, *(x for x in held if x is not None)]
        found = torch.autograd.grad(made, wanted, (d_q, d_k, d_v, d_g, d_beta))
    d_qkv = torch.cat([x.reshape(batch, length, -1) for x in found[:3]], -1)
    a, b, conv, *bias, A_log, dt_bias = found[3:]
    return d_qkv, a, b, conv, A_log, dt_bias, bias[0] if bias else None


def gated_norm_backward(o, z, weight, d_y, spec):
    """Gradients of `gated_norm`'s o, z and weight, by autograd; `d_y` is the gradient of its result."""
    given = [x.detach().requires_grad_() for x in (o, z, weight)]
    with torch.enable_grad():
        return torch.autograd.grad(gated_norm(*given, spec), given, d_y)


def step(projected, weights, spec, conv_state, state):
    """Everything between a layer's projections, for tokens that continue a cache. Call it with float64 inputs.

    Args:
        projected, weights, spec, conv_state: as in `prologue`.
        state: ``[B, HV, K, V]``.

    Returns:
        ``(y, conv_state, state)``: ``[B, T, HV, V]``, and the new states; nothing is updated in place.
    """
    *inputs, conv_state = prologue(projected, weights, spec, conv_state=conv_state, keep=conv_state.shape[2])
    o, state = delta_rule(*inputs, scale=projected.q.shape[3] ** -0.5, initial_state=state)
    return gated_norm(o, projected.z, weights.norm, spec), conv_state, state
