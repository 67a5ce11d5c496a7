"""The chunk kernels' computation in plain PyTorch, to compare roundings with."""

from __future__ import annotations

import torch


def _substituted(lower, right):
    """The solution a of (1 + the part of `lower` below its diagonal) a = right, row by row. What BLAS rounds depends on
    the processor, up to a factor of four where keys are equal and beta is 2."""
    a = torch.empty_like(right)
    for i in range(a.shape[-1]):
        a[..., i, :] = right[..., i, :] - (lower[..., i, :i, None] * a[..., :i, :]).sum(-2)
    return a


def rounded_chunks(q, k, v, g, beta, *, scale, initial_state=None, cu_seqlens=None, qk_l2norm=False):
    """The kernels' chunk computation for one sequence in plain PyTorch, products in the inputs' dtype and fp32 else."""
    dtype = v.dtype

    def product(x, y):
        return x.to(dtype).float() @ y.to(dtype).float()

    group = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(group, 2) for x in (q, k))
    q, k, values, g, beta = (x.transpose(1, 2).float() for x in (q, k, v, g, beta))
    g = g if g.dim() == 4 else g[..., None]
    state, outputs = initial_state, []
    for first in range(0, v.shape[1], 64):
        part = slice(first, min(first + 64, v.shape[1]))
        q_c, k_c, v_c, beta_c, sums = (x[:, :, part] for x in (q, k, values, beta, g))
        sums = sums.double().cumsum(2)
        gap = (sums[:, :, :, None] - sums[:, :, None]).float().masked_fill(
            torch.ones(v_c.shape[2], v_c.shape[2]).triu(1).bool()[..., None], float("-inf")
        )  # fmt: skip
        kk, qk = (torch.einsum("bhid,bhjd,bhijd->bhij", x, k_c, gap.exp().expand(*gap.shape[:-1], k.shape[-1]))
                  for x in (k_c, q_c))  # fmt: skip
        a = _substituted(kk * beta_c[..., None], torch.diag_embed(beta_c))
        begin, finish = sums.exp().float(), (sums[:, :, -1:] - sums).exp().float()
        u = product(a, v_c - product(k_c * begin, state))
        outputs.append(scale * (product(q_c * begin, state) + product(qk, u)))
        state = state * begin[:, :, -1, :, None] + product((k_c * finish).transpose(-1, -2), u)
    return torch.cat(outputs, 2).transpose(1, 2).to(dtype), state
