"""The gated delta rule in plain PyTorch: any device, any float dtype, differentiable.

Chunked form, C tokens at a time, G the running sum of g inside a chunk (docs/delta_rule.md derives it):

    u = (I + A)^-1 beta (V - e^G K S) ,   A_ij = beta_i (k_i . k_j) e^(G_i - G_j)  for i > j
    O = scale (e^G Q S + P u) ,           P_ij = (q_i . k_j) e^(G_i - G_j)         for i >= j
    S <- e^(G_C) S + (e^(G_C - G) K)^T u

The oracle is `hf_gdn.kernels.reference.delta_rule`. Everything runs in the state's dtype: fp32, or float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Kernel, Request, register
from .contract import state_dtype

CHUNK = 64
# Tokens prepared at once. It bounds the memory in use at any T and keeps the working set near a CPU's caches.
SLAB = 512


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension."""
    return x * torch.rsqrt(torch.linalg.vecdot(x, x) + 1e-6).unsqueeze(-1)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes microseconds also where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def without_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast from rounding the state's products to 16 bits. fn's first argument is q, or has a q."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        device = (first if isinstance(first, Tensor) else first.q).device.type
        if not torch.is_autocast_enabled(device):
            return fn(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    return call


class _Products(NamedTuple):
    """What chunks need of q, k and g. R value heads share a key head; D is the decay's channels: 1 or K."""

    kk: Tensor  # [B, HK, R, N, C, C]  k_i . k_j e^(G_i - G_j) for i > j; on and above the diagonal anything
    qk: Tensor  # [B, HK, R, N, C, C]  q_i . k_j e^(G_i - G_j) for i >= j, else 0
    from_start: Tensor  # [B, HK, R, N, C, D]  e^G
    to_end: Tensor  # [B, HK, R, N, C, D]  e^(G_C - G)
    whole: Tensor  # [B, HK, R, N, D, 1]  e^(G_C)


def _scalar_products(q: Tensor, k: Tensor, g: Tensor) -> _Products:
    """One decay per head: q, k ``[B, HK, 1, N, C, K]``, g ``[B, HK, R, N, C, 1]``. The dots serve all R heads."""
    # Differences of long sums: in fp32 a small decay would drown beside a large one. (MPS has no float64.)
    # A decay of -1e3 is 0 in every dtype; a sum with -inf or -1e30 in it would swallow the others.
    total = g.squeeze(-1).clamp(min=-1e3).cumsum(-1, dtype=g.dtype if g.device.type == "mps" else torch.float64)
    difference = (total[..., :, None] - total[..., None, :]).to(g.dtype)
    above = torch.ones(difference.shape[-2:], dtype=torch.bool, device=g.device).triu(1)
    pairwise = difference.masked_fill(above, float("-inf")).exp()
    keys = k.transpose(-1, -2)
    last = total[..., -1:]
    from_start, to_end, whole = ((x.to(g.dtype).exp())[..., None] for x in (total, last - total, last))
    return _Products((k @ keys) * pairwise, (q @ keys) * pairwise, from_start, to_end, whole)


def _channel_products(q: Tensor, k: Tensor, g: Tensor) -> _Products:
    """One decay per channel: q, k ``[B, HK, 1, N, C, K]``, g ``[B, HK, R, N, C, K]``, C a power of two.

    The square below the diagonal of a block of 2s rows splits at the block's middle: the decay from a column to the
    middle goes to its key, the decay from the middle to a row goes to its query or key. Both factors are at most 1, and
    both are sums of few terms of one sign, so any gate is served exactly; halving log2(C) times leaves the diagonal.
    """
    *outer, length, channels = g.shape
    q, k, before = (x.expand(g.shape).reshape(-1, length, channels).contiguous() for x in (q, k, g.clone()))
    after = torch.zeros_like(
        before
    )  # decay from a row, exclusive, to its block's end; `before`: from its start to a row
    rows = len(k)
    kk = k.new_zeros(rows * length, 1, 1)
    qk = (q * k).sum(-1).view(-1, 1, 1)
    size = 1
    while size < length:
        halves = (rows * length // (2 * size), 2, size, channels)
        k_early, k_late = k.view(halves).unbind(1)
        q_late = q.view(halves)[:, 1]
        before_early, before_late = before.view(halves).unbind(1)
        down = before_late.exp()
        up = (k_early * after.view(halves)[:, 0].exp()).transpose(-1, -2)
        kk = _block_lower(kk, (k_late * down) @ up)
        qk = _block_lower(qk, (q_late * down) @ up)
        # Join the halves into one block of twice the size.
        after.view(halves)[:, 0] += before_late[:, -1:]
        before.view(halves)[:, 1] += before_early[:, -1:]
        size *= 2
    from_start, to_end = before.exp().view(g.shape), after.exp().view(g.shape)
    kk, qk = (x.view(*outer, length, length) for x in (kk, qk))
    return _Products(kk, qk, from_start, to_end, from_start[..., -1, :, None])


def _block_lower(diagonal: Tensor, low: Tensor) -> Tensor:
    """``[[d_0, 0], [low, d_1]]`` of pairs of diagonal blocks ``[2n, s, s]`` and ``low [n, s, s]``: ``[n, 2s, 2s]``."""
    early, late = diagonal.view(len(low), 2, *diagonal.shape[1:]).unbind(1)
    return torch.cat((torch.cat((early, torch.zeros_like(low)), -1), torch.cat((low, late), -1)), -2)


def _slab(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunk: int):
    """Whole chunks: q, k ``[B, HK, T, K]``, v ``[B, HV, T, V]``, g ``[B, HV, T, D]``, beta ``[B, HV, T]``, scaled q."""
    key_heads, group = k.shape[1], v.shape[1] // k.shape[1]
    q, k = (x.unflatten(2, (-1, chunk)).unsqueeze(2) for x in (q, k))
    v, beta = v.unflatten(2, (-1, chunk)), beta.unflatten(2, (-1, chunk))
    g = g.unflatten(2, (-1, chunk)).unflatten(1, (key_heads, group))
    products = (_scalar_products if g.shape[-1] == 1 else _channel_products)(q, k, g)
    # Rows of keys above rows of queries: one product reads the state for both.
    reads = (torch.stack((k, q), -3) * products.from_start.unsqueeze(-3)).flatten(-3, -2).flatten(1, 2)
    writes = (k * products.to_end).transpose(-1, -2).flatten(1, 2)
    kk, qk, whole = (x.flatten(1, 2) for x in (products.kk, products.qk, products.whole))
    # solve_triangular reads below the diagonal only and takes ones on it.
    solved = torch.linalg.solve_triangular(
        kk * beta[..., None], torch.diag_embed(beta), upper=False, unitriangular=True
    )
    outputs = []
    for i in range(v.shape[2]):
        read = reads[:, :, i] @ state
        u = solved[:, :, i] @ (v[:, :, i] - read[..., :chunk, :])
        outputs.append(read[..., chunk:, :] + qk[:, :, i] @ u)
        state = state * whole[:, :, i] + writes[:, :, i] @ u
    return torch.cat(outputs, 2), state


def _start(v: Tensor, k_dim: int, initial_state: Tensor | None) -> Tensor:
    dtype = state_dtype(v.dtype)
    if initial_state is not None:
        return initial_state.to(dtype)
    return torch.zeros(v.shape[0], v.shape[2], k_dim, v.shape[3], dtype=dtype, device=v.device)


def _packed(fn, q, k, v, g, beta, *, cu_seqlens: Tensor, initial_state: Tensor | None, token_states=None, **kwargs):
    """Run packed sequences one after the other."""
    bounds = cu_seqlens.tolist()
    outputs, states = [], []
    for n, (first, last) in enumerate(pairwise(bounds)):
        state = None if initial_state is None else initial_state[n : n + 1]
        if token_states is not None:
            kwargs["token_states"] = token_states[:, first:last]
        o, state = fn(*(x[:, first:last] for x in (q, k, v, g, beta)), initial_state=state, **kwargs)
        outputs.append(o)
        states.append(state)
    if kwargs.get("inplace"):
        return torch.cat(outputs, 1), initial_state
    return torch.cat(outputs, 1), torch.cat(states, 0)


@without_autocast
def chunk(
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
) -> tuple[Tensor, Tensor]:
    """Chunked gated delta rule, one decay per head or per channel. Contract: `hf_gdn.kernels`."""
    if cu_seqlens is not None:
        return _packed(
            chunk,
            q,
            k,
            v,
            g,
            beta,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            scale=scale,
            qk_l2norm=qk_l2norm,
        )
    state = _start(v, q.shape[-1], initial_state)
    length = q.shape[1]
    if length == 0:
        return torch.empty_like(v), state.clone()
    size = min(CHUNK, 1 << (length - 1).bit_length())
    outputs = []
    for first in range(0, length, SLAB):
        part = slice(first, min(first + SLAB, length))
        padding = -(part.stop - first) % size  # zero keys, betas and log-decays leave the state alone

        def prepare(x: Tensor, part=part, padding=padding, dtype=state.dtype) -> Tensor:
            x = x[:, part].transpose(1, 2).to(dtype)
            x = F.pad(x, (*(0, 0) * (x.dim() - 3), 0, padding)) if padding else x
            return x.contiguous()

        qs, ks, vs, gs, betas = (prepare(x) for x in (q, k, v, g, beta))
        if qk_l2norm:
            qs, ks = l2norm(qs), l2norm(ks)
        o, state = _slab(qs * scale, ks, vs, gs if g.dim() == 4 else gs[..., None], betas, state, size)
        outputs.append(o[:, :, : part.stop - first].to(v.dtype))
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    return o.transpose(1, 2).contiguous(), state


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
    """Gated delta rule token by token, one decay per head or per channel. Contract: `hf_gdn.kernels`."""
    if cu_seqlens is not None:
        return _packed(
            recurrent, q, k, v, g, beta, cu_seqlens=cu_seqlens, initial_state=initial_state,
            scale=scale, qk_l2norm=qk_l2norm, inplace=inplace, token_states=token_states,
        )  # fmt: skip
    state = _start(v, q.shape[-1], initial_state)
    batch, length, k_heads, k_dim = k.shape
    v_heads, v_dim = v.shape[2:]
    heads = (batch, length, k_heads, v_heads // k_heads)  # value heads, R of them to a key head
    both = _cast(torch.stack((k, q), 3), state.dtype)  # [B, T, HK, 2, K]
    if qk_l2norm:
        both = l2norm(both)
    decay = _cast(g, state.dtype).exp().view(*heads, 1 if g.dim() == 3 else k_dim)
    values = _cast(v, state.dtype).view(*heads, v_dim)
    strengths = _cast(beta, state.dtype).view(*heads, 1)
    # A tensor of our own to update in place: the caller's when asked to, else a copy. Autograd needs every version.
    own = not (torch.is_grad_enabled() and any(x.requires_grad for x in (both, values, decay, strengths, state)))
    if own and not (inplace and length == 1):  # the caller's moves last, when nothing can fail any more
        state = state.clone()
    now = state.view(len(state), *heads[2:], k_dim, v_dim)
    o = v.new_empty(v.shape) if own else None
    outputs = list(o.view(*heads, v_dim).unbind(1)) if o is not None else []
    tokens = zip(both.unbind(1), values.unbind(1), decay.unbind(1), strengths.unbind(1))
    for t, (kq, value, fade, strength) in enumerate(tokens):
        answer, key, u, fade = _token(kq, value, fade, strength, now)
        if own:
            outputs[t].copy_(answer.mul_(scale))
            now.mul_(fade).addcmul_(key, u)
        else:
            outputs.append(answer)
            now = torch.addcmul(now * fade, key, u)
        if token_states is not None:
            token_states[:, t] = now.flatten(1, 2)
    if o is None:
        o = _cast(torch.stack(outputs, 1).mul_(scale).view(v.shape), v.dtype) if outputs else torch.empty_like(v)
    state = state if own else now.flatten(1, 2)
    if inplace and initial_state is not None and state is not initial_state:
        state = initial_state.copy_(state)
    return o, state


def _token(both: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """One token: both = (k, q) ``[B, HK, 2, K]``, v ``[B, HK, R, V]``, decay ``[B, HK, R, 1 or K]``, beta
    ``[B, HK, R, 1]``, state ``[B, HK, R, K, V]``. Returns o before its scale, and k, u and the decay, shaped so that
    ``state * decay + k * u`` is the next state.
    """
    # S^T k after the decay is (decay k)^T S before it, so that one pass over the state serves k and q.
    known, answer = ((both.unsqueeze(2) * decay.unsqueeze(3)) @ state).unbind(3)
    u = (v - known) * beta
    k, q = both.unsqueeze(2).unbind(3)  # [B, HK, 1, K]
    o = torch.addcmul(answer, torch.linalg.vecdot(k, q).unsqueeze(-1), u)
    return o, k.unsqueeze(-1), u.unsqueeze(3), decay.unsqueeze(-1)


def why_not(request: Request) -> str | None:
    if not request.dtype.is_floating_point:
        return f"serves floating-point tensors; these are {str(request.dtype).removeprefix('torch.')}"
    return None


# Tokens up to which the recurrent kernel is the faster one, of one sequence and 32 heads on a CPU of two cores:
# python benchmarks/prefill.py --only even; docs/tuning.md has the table.
_RECURRENT = {"gdn": 4, "kda": 8}
for _rule, _tokens in _RECURRENT.items():
    _common: dict[str, Any] = dict(backend="eager", why_not=why_not, differentiable=True, traceable=True)
    register(Kernel(f"chunk_{_rule}", fn=chunk, **_common))
    register(Kernel(f"recurrent_{_rule}", fn=recurrent, max_tokens=_tokens, **_common))
