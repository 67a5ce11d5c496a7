"""The gated delta rule token by token, for decoding and short sequences.

Per sequence and value head, with S of shape [K, V]:

    S <- diag(exp g_t) S ;  u = beta_t (v_t - S^T k_t) ;  S <- S + k_t u^T ;  o_t = scale * S^T q_t

The oracle is `hf_gdn.kernels.reference.delta_rule`. All arithmetic is in the state's dtype: fp32, or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import check_no_gradients
from .math import l2norm
from .runtime import why_not, without_autocast
from .sequences import one_after_another, starting_state


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), without its overhead of microseconds if the dtype is already right."""
    return x if x.dtype == dtype else x.to(dtype)


@without_autocast
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    inplace: bool = False,
    token_states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule token by token, one decay per head or per channel. Contract: `hf_gdn.kernels.contract`."""
    check_no_gradients(inplace, token_states, q, k, v, g, beta, initial_state)
    if cu_seqlens is not None:
        return one_after_another(
            recurrent,
            q,
            k,
            v,
            g,
            beta,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            scale=scale,
            qk_l2norm=qk_l2norm,
            inplace=inplace,
            token_states=token_states,
        )
    state = starting_state(v, q.shape[-1], initial_state)
    batch, length, k_heads, k_dim = k.shape
    v_heads, v_dim = v.shape[2:]
    heads = (batch, length, k_heads, v_heads // k_heads)  # value heads, R per key head
    kq = _cast(torch.stack((k, q), 3), state.dtype)  # [B, T, HK, 2, K]
    if qk_l2norm:
        kq = l2norm(kq)
    decay = _cast(g, state.dtype).exp().view(*heads, 1 if g.dim() == 3 else k_dim)
    values = _cast(v, state.dtype).view(*heads, v_dim)
    strengths = _cast(beta, state.dtype).view(*heads, 1)
    # Without gradients, a copy of the state is updated in place (for one token with `inplace`, the caller's tensor).
    # Autograd needs every version of the state.
    owns_state = not (torch.is_grad_enabled() and any(x.requires_grad for x in (kq, values, decay, strengths, state)))
    if owns_state and not (inplace and length == 1):  # the caller's tensor is written last, when nothing can fail
        state = state.clone()
    now = state.view(len(state), *heads[2:], k_dim, v_dim)
    o = v.new_empty(v.shape) if owns_state else None
    outputs = list(o.view(*heads, v_dim).unbind(1)) if o is not None else []
    tokens = zip(kq.unbind(1), values.unbind(1), decay.unbind(1), strengths.unbind(1))
    for t, token in enumerate(tokens):
        read, key, u, kept = _token(*token, now)
        if owns_state:
            outputs[t].copy_(read.mul_(scale))
            now.mul_(kept).addcmul_(key, u)
        else:
            outputs.append(read)
            now = torch.addcmul(now * kept, key, u)
        if token_states is not None:
            token_states[:, t] = now.flatten(1, 2)
    if o is None:
        o = _cast(torch.stack(outputs, 1).mul_(scale).view(v.shape), v.dtype) if outputs else torch.empty_like(v)
    state = state if owns_state else now.flatten(1, 2)
    if inplace and initial_state is not None and state is not initial_state:
        state = initial_state.copy_(state)
    return o, state


def _token(kq: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """One token: kq = (k, q) ``[B, HK, 2, K]``, v ``[B, HK, R, V]``, decay ``[B, HK, R, 1 or K]``, beta
    ``[B, HK, R, 1]``, state ``[B, HK, R, K, V]``. Returns o without `scale`, and k, u and the decay, shaped so that
    ``state * decay + k * u`` is the next state.
    """
    # S^T k with the decayed S equals (decay k)^T S with the old one, so one pass over the state serves k and q.
    known, read = ((kq.unsqueeze(2) * decay.unsqueeze(3)) @ state).unbind(3)
    u = (v - known) * beta
    k, q = kq.unsqueeze(2).unbind(3)  # [B, HK, 1, K]
    o = torch.addcmul(read, torch.linalg.vecdot(k, q).unsqueeze(-1), u)
    return o, k.unsqueeze(-1), u.unsqueeze(3), decay.unsqueeze(-1)


# The number of tokens up to which this kernel is faster than the chunk kernel, for one sequence and 32 heads on a CPU
# with two cores. benchmarks/README.md has the command, docs/tuning.md the table.
for _op, _tokens in (("recurrent_gdn", 4), ("recurrent_kda", 8)):
    register(Kernel(_op, "eager", recurrent, why_not, differentiable=True, traceable=True, max_tokens=_tokens))
