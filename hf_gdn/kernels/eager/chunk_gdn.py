"""The gated delta rule in chunks, one decay per head (GDN); `chunks` has the equations and names the oracle."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...registry import Kernel, register
from .chunks import TOKENS_PER_BLOCK, Products, by_chunks, save
from .runtime import why_not, without_autocast


def sums(g: Tensor) -> tuple[Tensor, Tensor]:
    """Running sums of g ``[.., C, 1]``, and e^(G_i - G_j) ``[.., C, C]``, zero above the diagonal."""
    # Sums are float64: in a difference of fp32 sums, a small decay is lost next to a large one. MPS has no float64.
    # Clamped, because -inf or -1e30 in a sum would absorb all other terms; exp(-1e3) is 0 in every dtype.
    total = g.squeeze(-1).clamp(min=-1e3).cumsum(-1, dtype=g.dtype if g.device.type == "mps" else torch.float64)
    difference = (total[..., :, None] - total[..., None, :]).to(g.dtype)
    above = torch.ones(difference.shape[-2:], dtype=torch.bool, device=g.device).triu(1)
    return total, difference.masked_fill(above, float("-inf")).exp()


def products(q: Tensor, k: Tensor, g: Tensor) -> Products:
    """Products of q, k ``[B, HK, 1, N, C, K]`` and g ``[B, HK, R, N, C, 1]``. All R heads share the dot products."""
    total, pairwise = sums(g)
    keys = k.transpose(-1, -2)
    last = total[..., -1:]
    from_start, to_end, whole = ((x.to(g.dtype).exp())[..., None] for x in (total, last - total, last))
    return Products((k @ keys) * pairwise, (q @ keys) * pairwise, from_start, to_end, whole)


@without_autocast
def chunk_gdn(
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
    """Chunked gated delta rule, one decay per head. Contract: `hf_gdn.kernels.contract`."""
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
        "chunk_gdn",
        "eager",
        chunk_gdn,
        why_not,
        differentiable=True,
        traceable=True,
        save=without_autocast(functools.partial(save, products)),
        keep=TOKENS_PER_BLOCK,
    )
)
