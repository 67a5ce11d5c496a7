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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .math import l2norm
from .sequences import one_after_another, starting_state

CHUNK = 64
# Tokens prepared at once. This bounds memory for any T and keeps the working set small enough for CPU caches.
TOKENS_PER_BLOCK = 512


class Products(NamedTuple):
    """Products of q, k and g within each of N chunks of C tokens. D is the number of decay channels: 1 or K."""

    kk: Tensor  # [B, HK, R, N, C, C]  k_i . k_j e^(G_i - G_j) for i > j; arbitrary on and above the diagonal
    qk: Tensor  # [B, HK, R, N, C, C]  q_i . k_j e^(G_i - G_j) for i >= j, else 0
    from_start: Tensor  # [B, HK, R, N, C, D]  e^G
    to_end: Tensor  # [B, HK, R, N, C, D]  e^(G_C - G)
    whole: Tensor  # [B, HK, R, N, D, 1]  e^(G_C)


FindProducts = Callable[[Tensor, Tensor, Tensor], Products]


def _whole_chunks(
    find_products: FindProducts, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Whole chunks: q (scaled), k ``[B, HK, T, K]``, v ``[B, HV, T, V]``, g ``[B, HV, T, D]``, beta ``[B, HV, T]``."""
    key_heads, group = k.shape[1], v.shape[1] // k.shape[1]
    q, k = (x.unflatten(2, (-1, chunk)).unsqueeze(2) for x in (q, k))
    v, beta = v.unflatten(2, (-1, chunk)), beta.unflatten(2, (-1, chunk))
    g = g.unflatten(2, (-1, chunk)).unflatten(1, (key_heads, group))
    products = find_products(q, k, g)
    # Keys and queries are stacked, so that one product reads the state for both.
    reads = (torch.stack((k, q), -3) * products.from_start.unsqueeze(-3)).flatten(-3, -2).flatten(1, 2)
    writes = (k * products.to_end).transpose(-1, -2).flatten(1, 2)
    kk, qk, whole = (x.flatten(1, 2) for x in (products.kk, products.qk, products.whole))
    # With unitriangular=True, solve_triangular reads only the part below the diagonal.
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
) -> tuple[Tensor, Tensor]:
    """The chunked delta rule with the products of `find_products`; all other arguments are those of the op."""
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
        )
    state = starting_state(v, q.shape[-1], initial_state)
    length = q.shape[1]
    if length == 0:
        return torch.empty_like(v), state.clone()
    size = min(CHUNK, 1 << (length - 1).bit_length())
    outputs = []
    for first in range(0, length, TOKENS_PER_BLOCK):
        part = slice(first, min(first + TOKENS_PER_BLOCK, length))
        padding = -(part.stop - first) % size  # zero keys, betas and log-decays do not change the state

        def prepare(x: Tensor, part=part, padding=padding, dtype=state.dtype) -> Tensor:
            x = x[:, part].transpose(1, 2).to(dtype)
            x = F.pad(x, (*(0, 0) * (x.dim() - 3), 0, padding)) if padding else x
            return x.contiguous()

        qs, ks, vs, gs, betas = (prepare(x) for x in (q, k, v, g, beta))
        if qk_l2norm:
            qs, ks = l2norm(qs), l2norm(ks)
        gs = gs if g.dim() == 4 else gs[..., None]
        o, state = _whole_chunks(find_products, qs * scale, ks, vs, gs, betas, state, size)
        outputs.append(o[:, :, : part.stop - first].to(v.dtype))
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    return o.transpose(1, 2).contiguous(), state
