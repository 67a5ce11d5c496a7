"""The delta rule in chunks, one decay per channel (KDA); `chunks` has the equations and names the oracle."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...registry import Kernel, register
from .chunks import TOKENS_PER_BLOCK, Products, by_chunks, save
from .runtime import why_not, without_autocast


def products(q: Tensor, k: Tensor, g: Tensor) -> Products:
    """Products of q, k ``[B, HK, 1, N, C, K]``, g ``[B, HK, R, N, C, K]``, C a power of two.

    In a block of 2s rows, the decays of the square below the diagonal are split at the middle of the block: the decay
    from a column to the middle multiplies its key, the decay from the middle to a row multiplies its query or key. Both
    factors are at most 1, and their exponents are sums of few terms of one sign, so the result is accurate for any
    gate. log2(C) such levels cover everything but the diagonal.
    """
    *outer, length, channels = g.shape
    q, k, before = (x.expand(g.shape).reshape(-1, length, channels).contiguous() for x in (q, k, g.clone()))
    # Log-decay from a block's start to a row (`before`), and from a row, exclusive, to its block's end (`after`).
    after = torch.zeros_like(before)
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
    return Products(kk, qk, from_start, to_end, from_start[..., -1, :, None])


def _block_lower(diagonal: Tensor, low: Tensor) -> Tensor:
    """``[[d_0, 0], [low, d_1]]`` ``[n, 2s, 2s]`` from pairs of diagonal blocks ``[2n, s, s]`` and low ``[n, s, s]``."""
    early, late = diagonal.view(len(low), 2, *diagonal.shape[1:]).unbind(1)
    return torch.cat((torch.cat((early, torch.zeros_like(low)), -1), torch.cat((low, late), -1)), -2)


@without_autocast
def chunk_kda(
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
    """Chunked gated delta rule, one decay per channel. Contract: `hf_gdn.kernels.contract`."""
    return by_chunks(
        products,
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
    )


register(
    Kernel(
        "chunk_kda",
        "eager",
        chunk_kda,
        why_not,
        differentiable=True,
        traceable=True,
        save=without_autocast(functools.partial(save, products)),
        keep=TOKENS_PER_BLOCK,
    )
)
