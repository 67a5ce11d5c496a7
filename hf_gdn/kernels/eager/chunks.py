"""The gated delta rule in chunks of 64 tokens: the code shared by GDN and KDA.

G is the running sum of g inside a chunk, S the state before it (docs/delta_rule.md derives the form):

    u = (I + A)^-1 beta (V - e^G K S) ,   A_ij = beta_i (k_i . k_j) e^(G_i - G_j)  for i > j
    O = scale (e^G Q S + P u) ,           P_ij = (q_i . k_j) e^(G_i - G_j)         for i >= j
    S <- e^(G_C) S + (e^(G_C - G) K)^T u

The oracle is `hf_gdn.kernels.reference.delta_rule`. All arithmetic is in the state's dtype: fp32, or float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import saved_rows
from .math import l2norm
from .sequences import one_after_another, starting_state

CHUNK = 64
# Tokens prepared at once. This bounds memory for any T and keeps the working set small enough for CPU caches.
TOKENS_PER_BLOCK = 256


class Products(NamedTuple):
    """Products of q, k and g within each of N chunks of C tokens. D is the number of decay channels: 1 or K."""

    kk: Tensor  # [B, HK, R, N, C, C]  k_i . k_j e^(G_i - G_j) for i > j; arbitrary on and above the diagonal
    qk: Tensor  # [B, HK, R, N, C, C]  q_i . k_j e^(G_i - G_j) for i >= j, else 0
    from_start: Tensor  # [B, HK, R, N, C, D]  e^G
    to_end: Tensor  # [B, HK, R, N, C, D]  e^(G_C - G)
    whole: Tensor  # [B, HK, R, N, D, 1]  e^(G_C)


FindProducts = Callable[[Tensor, Tensor, Tensor], Products]


class Transitions(NamedTuple):
    """What N chunks do with the states before them, ``[B, HV, N, ...]``, and the inputs it was made from."""

    q: Tensor  # [B, HK, 1, N, C, K]
    k: Tensor  # [B, HK, 1, N, C, K]
    v: Tensor
    g: Tensor  # [B, HK, R, N, C, D]
    products: Products
    reads: Tensor  # [.., 2C, K]  e^G K over e^G Q, so that one product reads a state for both
    writes: Tensor  # [.., C, K]  e^(G_C - G) K
    kk: Tensor  # [.., C, C]
    qk: Tensor  # [.., C, C]
    whole: Tensor  # [.., D, 1]
    solved: Tensor  # [.., C, C]  (I + A)^-1 beta


def transitions(
    find_products: FindProducts, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk: int
) -> Transitions:
    """Whole chunks: q (scaled), k ``[B, HK, T, K]``, v ``[B, HV, T, V]``, g ``[B, HV, T, D]``, beta ``[B, HV, T]``."""
    key_heads, group = k.shape[1], v.shape[1] // k.shape[1]
    q, k = (x.unflatten(2, (-1, chunk)).unsqueeze(2) for x in (q, k))
    v, beta = v.unflatten(2, (-1, chunk)), beta.unflatten(2, (-1, chunk))
    g = g.unflatten(2, (-1, chunk)).unflatten(1, (key_heads, group))
    products = find_products(q, k, g)
    reads = (torch.stack((k, q), -3) * products.from_start.unsqueeze(-3)).flatten(-3, -2).flatten(1, 2)
    writes = (k * products.to_end).flatten(1, 2)
    kk, qk, whole = (x.flatten(1, 2) for x in (products.kk, products.qk, products.whole))
    # In float64 where there is one: with equal keys and a beta of 2 the condition of the system is 4 * 64^2, which
    # leaves 1e-4 of fp32. With unitriangular=True, solve_triangular reads only the part below the diagonal.
    exact = torch.float64 if kk.device.type != "mps" else kk.dtype
    system, right = (kk * beta[..., None]).to(exact), torch.diag_embed(beta).to(exact)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).to(kk.dtype)
    return Transitions(q, k, v, g, products, reads, writes, kk, qk, whole, solved)


def _outputs(chunks: Transitions, state: Tensor) -> tuple[Tensor, Tensor]:
    """o ``[B, HV, T, V]`` and the state after the chunks, from the state before them."""
    outputs, size = [], chunks.kk.shape[-1]
    for i in range(chunks.v.shape[2]):
        read = chunks.reads[:, :, i] @ state
        u = chunks.solved[:, :, i] @ (chunks.v[:, :, i] - read[..., :size, :])
        outputs.append(read[..., size:, :] + chunks.qk[:, :, i] @ u)
        state = state * chunks.whole[:, :, i] + chunks.writes[:, :, i].mT @ u
    return torch.cat(outputs, 2), state


def blocks(length: int) -> list[tuple[slice, int]]:
    """The blocks of a sequence: their tokens, and the tokens of a chunk."""
    size = min(CHUNK, 1 << (length - 1).bit_length())
    starts = range(0, length, TOKENS_PER_BLOCK)
    return [(slice(first, min(first + TOKENS_PER_BLOCK, length)), size) for first in starts]


def block(x: Tensor, part: slice, size: int, dtype: torch.dtype) -> Tensor:
    """Tokens `part` of ``[B, T, H, ...]`` in whole chunks, ``[B, H, ...]``; zero keys and betas change no state."""
    x = x[:, part].transpose(1, 2).to(dtype)
    padding = -x.shape[2] % size
    return (F.pad(x, (*(0, 0) * (x.dim() - 3), 0, padding)) if padding else x).contiguous()


def by_chunks(
    find_products: FindProducts,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool,
    starts: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunked delta rule with the products of `find_products`; all other arguments are those of the op.

    The states before all blocks of a sequence but its first are appended to `starts`.
    """
    if cu_seqlens is not None:
        return one_after_another(
            functools.partial(by_chunks, find_products),
            q,
            k,
            v,
            g,
            beta,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            scale=scale,
            qk_l2norm=qk_l2norm,
            starts=starts,
        )
    state = starting_state(v, q.shape[-1], initial_state)
    length = q.shape[1]
    if length == 0:
        return torch.empty_like(v), state.clone()
    outputs = []
    for part, size in blocks(length):
        if starts is not None and part.start > 0:
            starts.append(state)
        qs, ks, vs, gs, betas = (block(x, part, size, state.dtype) for x in (q, k, v, g, beta))
        if qk_l2norm:
            qs, ks = l2norm(qs), l2norm(ks)
        gs = gs if g.dim() == 4 else gs[..., None]
        o, state = _outputs(transitions(find_products, qs * scale, ks, vs, gs, betas, size), state)
        outputs.append(o[:, :, : part.stop - part.start].to(v.dtype))
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    return o.transpose(1, 2).contiguous(), state


def save(
    find_products: FindProducts,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`by_chunks` that also returns the states between blocks."""
    starts: list[Tensor] = []
    o, final_state = by_chunks(find_products, q, k, v, g, beta, cu_seqlens=cu_seqlens, starts=starts, **options)
    rows = saved_rows(q.shape[0], q.shape[1], cu_seqlens is not None, TOKENS_PER_BLOCK)
    saved = final_state.new_empty(rows, *final_state.shape[1:])
    if starts:
        torch.cat(starts, out=saved[: sum(map(len, starts))])
    return o, final_state, saved
