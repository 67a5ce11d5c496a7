"""The gradients of the chunked delta rule, one decay per channel (KDA); `chunks_backward` has the equations."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...registry import Kernel, register
from .chunk_kda import products
from .chunks import Products
from .chunks_backward import ProductGradients, Rule, backward, decay_gradient
from .runtime import why_not, without_autocast


def _products_backward(
    q: Tensor, k: Tensor, g: Tensor, made: Products, d: ProductGradients
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and g, level by level as in `chunk_kda.products`.

    G_i multiplies what stands in row i and divides what stands in column i, so that its gradient is q_i and k_i times
    the gradients of what they are as rows, less k_i times that of what it is as a column.
    """
    *_, length, channels = g.shape
    q, k, before = (x.expand(g.shape).reshape(-1, length, channels).contiguous() for x in (q, k, g.clone()))
    after = torch.zeros_like(before)
    kk, qk = (x.reshape(-1, length, length) for x in (d.kk, d.qk))
    d_q, d_row, d_column = torch.zeros_like(k), torch.zeros_like(k), torch.zeros_like(k)
    size = 1
    while size < length:
        halves = (len(k) * length // (2 * size), 2, size, channels)
        k_early, k_late = k.view(halves).unbind(1)
        q_late = q.view(halves)[:, 1]
        before_early, before_late = before.view(halves).unbind(1)
        down, up = before_late.exp(), after.view(halves)[:, 0].exp()
        keys = k_early * up
        kk_low, qk_low = (_lower_blocks(x, size) for x in (kk, qk))
        d_row.view(halves)[:, 1].addcmul_(kk_low @ keys, down)
        d_q.view(halves)[:, 1].addcmul_(qk_low @ keys, down)
        d_keys = kk_low.mT @ (k_late * down) + qk_low.mT @ (q_late * down)
        d_column.view(halves)[:, 0].addcmul_(d_keys, up)
        after.view(halves)[:, 0] += before_late[:, -1:]
        before.view(halves)[:, 1] += before_early[:, -1:]
        size *= 2
    d_q, d_row, d_column, q, k = (x.view(g.shape) for x in (d_q, d_row, d_column, q, k))
    d_q.addcmul_(d.q_from_start, made.from_start)
    d_row.addcmul_(d.k_from_start, made.from_start)
    written = d.k_to_end * made.to_end
    d_g = decay_gradient(q * d_q + k * (d_row - d_column), k * written, made.whole[..., 0] * d.whole)
    diagonal = d.qk.diagonal(dim1=-2, dim2=-1)[..., None]  # where nothing decays
    d_q = d_q.addcmul_(diagonal, k).sum(2, keepdim=True)
    d_k = (d_row + d_column + written).addcmul_(diagonal, q).sum(2, keepdim=True)
    return d_q, d_k, d_g


def _lower_blocks(x: Tensor, size: int) -> Tensor:
    """The lower left quarters ``[.., size, size]`` of the blocks of 2 size rows on the diagonals of ``[n, C, C]``."""
    blocks = x.unflatten(2, (-1, 2, size)).unflatten(1, (-1, 2, size))[:, :, 1, :, :, 0]
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, size, size)


_rule = Rule(products, _products_backward)
_backward = without_autocast(functools.partial(backward, _rule))
register(Kernel("backward_kda", "eager", _backward, why_not, fast_on=("cpu",)))
