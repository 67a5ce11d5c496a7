"""The backward of the chunked gated delta rule: the code shared by GDN and KDA.

With the names of `chunks`, M = -tril(kk, -1), P the scores, and X' the gradient of X, from a sequence's last chunk to
its first (docs/delta_rule.md derives it):

    r = V - e^G K S ;  u = (I - beta M)^-1 beta r
    u' = P^T O' + (e^(G_C - G) K) S_next' ;  r' = V' = ((I - beta M)^-1 beta)^T u'
    S' = e^(G_C) S_next' + (scale e^G Q)^T O' - (e^G K)^T r'
    P' = tril(O' u^T) ;  M' = tril(r' u^T, -1) ;  beta' = sum_V (r + M u) (u' + M^T r')

and the gradients of e^G Q, e^G K and e^(G_C - G) K are O' S^T, -r' S^T and u S_next'^T. Everything is computed again
from the inputs and the states between blocks: nothing else is saved. The oracle is autograd through
`hf_gdn.kernels.reference.delta_rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Gradients
from .chunks import FindProducts, Products, block, blocks, save, transitions
from .sequences import starting_state

# Value heads computed at once on a CPU: intermediates take some 3 MiB a head (K = V = 128, fp32).
VALUE_HEADS = 8


class ProductGradients(NamedTuple):
    """Gradients of `Products` and of q and k multiplied by their decays."""

    kk: Tensor  # [B, HK, R, N, C, C], strictly lower triangular
    qk: Tensor  # [B, HK, R, N, C, C], lower triangular
    q_from_start: Tensor  # [B, HK, R, N, C, K]  of e^G Q
    k_from_start: Tensor  # [B, HK, R, N, C, K]  of e^G K
    k_to_end: Tensor  # [B, HK, R, N, C, K]  of e^(G_C - G) K
    whole: Tensor  # [B, HK, R, N, D]  of e^(G_C)


# From q, k, g and the products: gradients of q and k ``[B, HK, 1, N, C, K]`` and of g ``[B, HK, R, N, C, D]``.
ProductsBackward = Callable[[Tensor, Tensor, Tensor, Products, ProductGradients], tuple[Tensor, Tensor, Tensor]]


class Rule(NamedTuple):
    """What differs between GDN and KDA."""

    products: FindProducts
    products_backward: ProductsBackward


def decay_gradient(by_row: Tensor, at_end: Tensor, whole: Tensor) -> Tensor:
    """The gradient of g ``[.., C, D]``. A decay multiplies all from its row on, so it sums over rows.

    Args:
        by_row: ``[.., C, D]``, what rows get by their decay from the start, less what they lose as columns of scores.
        at_end: ``[.., C, D]``, what rows get by their decay to the end: by that of all rows after them.
        whole: ``[.., D]``, what the state before the chunk gets by its decay.
    """
    # No difference of two sums: where gates forget everything, rounding would be more than what is left.
    later = F.pad(at_end[..., :-1, :].cumsum(-2), (0, 0, 1, 0))
    return by_row.flip(-2).cumsum(-2).flip(-2) + later + whole[..., None, :]


def backward(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    d_o: Tensor,
    d_final_state: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    saved: Tensor | None = None,
) -> Gradients:
    """Gradients of the chunked delta rule. Contract: `hf_gdn.kernels.contract`."""
    options: dict[str, Any] = dict(scale=scale, qk_l2norm=qk_l2norm)
    if saved is None:
        *_, saved = save(rule.products, q, k, v, g, beta, initial_state=initial_state, cu_seqlens=cu_seqlens, **options)
    empty = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta)]
    d_state = torch.empty_like(d_final_state)
    bounds = [(0, q.shape[1])] if cu_seqlens is None else pairwise(cu_seqlens.tolist())
    row = 0
    for sequence, (first, last) in enumerate(bounds):
        part, states = slice(first, last), slice(None) if cu_seqlens is None else slice(sequence, sequence + 1)
        start = starting_state(v[:, part], q.shape[-1], None if initial_state is None else initial_state[states])
        starts = [start]
        for _ in blocks(last - first)[1:]:
            starts.append(saved[row : row + len(start)])
            row += len(start)
        for keys, values in _head_groups(q.shape[2], v.shape[2], v.device.type == "cpu"):
            d_state[states, values] = _sequence(
                rule,
                q[:, part, keys],
                k[:, part, keys],
                v[:, part, values],
                g[:, part, values],
                beta[:, part, values],
                d_o[:, part, values],
                starts=[x[:, values] for x in starts],
                d_state=d_final_state[states, values].to(start.dtype),
                found=[x[:, part, keys if n < 2 else values] for n, x in enumerate(empty)],
                **options,
            )
    d_q, d_k, d_v, d_g, d_beta = empty
    return Gradients(d_q, d_k, d_v, d_g, d_beta, None if initial_state is None else d_state.to(initial_state.dtype))


def _head_groups(key_heads: int, value_heads: int, few: bool) -> Iterator[tuple[slice, slice]]:
    """The key and value heads that are computed together: `few`, to save memory, or all."""
    group = value_heads // key_heads
    size = max(1, VALUE_HEADS // group) if few else key_heads
    for first in range(0, key_heads, size):
        last = min(first + size, key_heads)
        yield slice(first, last), slice(first * group, last * group)


def _sequence(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    d_o: Tensor,
    *,
    starts: list[Tensor],
    d_state: Tensor,
    found: list[Tensor],
    scale: float,
    qk_l2norm: bool,
) -> Tensor:
    """Write the gradients of a sequence to `found`, its last block first; return the gradient of its first state."""
    for state, (part, size) in reversed(list(zip(starts, blocks(q.shape[1])))):
        qs, ks, vs, gs, betas, d_os = (block(x, part, size, state.dtype) for x in (q, k, v, g, beta, d_o))
        lengths = [torch.rsqrt(torch.linalg.vecdot(x, x) + 1e-6)[..., None] for x in (qs, ks)] if qk_l2norm else []
        if qk_l2norm:
            qs, ks = qs * lengths[0], ks * lengths[1]
        gs = gs if g.dim() == 4 else gs[..., None]
        d_q, d_k, d_v, d_g, d_beta, d_state = _block(rule, qs * scale, ks, vs, gs, betas, state, d_os, d_state, size)
        d_q *= scale
        if qk_l2norm:
            d_q, d_k = (
                (d - x * torch.linalg.vecdot(x, d)[..., None]) * length
                for x, d, length in zip((qs, ks), (d_q, d_k), lengths)
            )
        for target, d in zip(found, (d_q, d_k, d_v, d_g if g.dim() == 4 else d_g[..., 0], d_beta)):
            target[:, part] = d[:, :, : part.stop - part.start].transpose(1, 2)
    return d_state


def _block(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    d_o: Tensor,
    d_state: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of whole chunks, arguments and layout as in `transitions`."""
    chunks = transitions(rule.products, q, k, v, g, beta, size)
    q, k, v, g, products, reads, writes, kk, qk, whole, solved = chunks
    products = products._replace(kk=products.kk.tril(-1))
    kk = products.kk.flatten(1, 2)
    d_o = d_o.unflatten(2, (-1, size))

    numbers = range(v.shape[2])
    states = v.new_empty(*v.shape[:3], k.shape[-1], v.shape[-1])
    r, u = torch.empty_like(v), torch.empty_like(v)
    for i in numbers:
        states[:, :, i] = state
        r[:, :, i] = v[:, :, i] - reads[:, :, i, :size] @ state
        u[:, :, i] = solved[:, :, i] @ r[:, :, i]
        if i < numbers[-1]:
            state = state * whole[:, :, i] + writes[:, :, i].mT @ u[:, :, i]

    d_u = qk.mT @ d_o
    d_states = torch.empty_like(states)  # of the states after the chunks
    # -r' over O', as `reads` has keys over queries.
    d_read = v.new_empty(*v.shape[:3], 2 * size, v.shape[-1])
    d_read[..., size:, :] = d_o
    for i in reversed(numbers):
        d_states[:, :, i] = d_state
        d_u[:, :, i] += writes[:, :, i] @ d_state
        torch.neg(solved[:, :, i].mT @ d_u[:, :, i], out=d_read[:, :, i, :size])
        d_state = d_state * whole[:, :, i] + reads[:, :, i].mT @ d_read[:, :, i]
    minus_d_r = d_read[..., :size, :]

    d_reads = d_read @ states.mT
    if g.shape[-1] == 1:
        d_whole = torch.linalg.vecdot(states.flatten(-2), d_states.flatten(-2))[..., None]
    else:
        d_whole = torch.linalg.vecdot(states, d_states)
    d_products = ProductGradients(
        kk=(minus_d_r @ u.mT).tril_(-1),
        qk=(d_o @ u.mT).tril_(),
        q_from_start=d_reads[..., size:, :],
        k_from_start=d_reads[..., :size, :],
        k_to_end=u @ d_states.mT,
        whole=d_whole,
    )
    d_beta = torch.linalg.vecdot(r - kk @ u, d_u + kk.mT @ minus_d_r)
    by_key_head = (x.unflatten(1, (k.shape[1], -1)) for x in d_products)
    d_q, d_k, d_g = rule.products_backward(q, k, g, products, ProductGradients(*by_key_head))
    d_q, d_k = (x.squeeze(2).flatten(2, 3) for x in (d_q, d_k))
    return d_q, d_k, -minus_d_r.flatten(2, 3), d_g.flatten(1, 2).flatten(2, 3), d_beta.flatten(2, 3), d_state
