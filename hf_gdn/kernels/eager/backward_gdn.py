"""The gradients of the chunked delta rule, one decay per head (GDN); `chunks_backward` has the equations."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...registry import Kernel, register
from .chunk_gdn import products, sums
from .chunks import Products
from .chunks_backward import ProductGradients, Rule, backward, decay_gradient
from .runtime import why_not, without_autocast


def _products_backward(
    q: Tensor, k: Tensor, g: Tensor, made: Products, d: ProductGradients
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and g. The R heads' scores are summed before keys and queries multiply them."""
    _, pairwise = sums(g)
    by_score = (d.qk * made.qk + d.kk * made.kk).tril_(-1)  # nothing decays on the diagonal
    scores = (d.qk * pairwise).sum(2, keepdim=True)
    keys = (d.kk * pairwise).sum(2, keepdim=True)
    q_read, k_read = d.q_from_start * made.from_start, d.k_from_start * made.from_start
    written = d.k_to_end * made.to_end
    d_total = by_score.sum(-1) - by_score.sum(-2)
    d_total += torch.linalg.vecdot(q, q_read) + torch.linalg.vecdot(k, k_read)
    d_whole = made.whole[..., 0] * d.whole
    d_g = decay_gradient(d_total[..., None], torch.linalg.vecdot(k, written)[..., None], d_whole)
    d_q = q_read.sum(2, keepdim=True) + scores @ k
    d_k = (k_read + written).sum(2, keepdim=True) + scores.mT @ q + (keys + keys.mT) @ k
    return d_q, d_k, d_g


_rule = Rule(products, _products_backward)
_backward = without_autocast(functools.partial(backward, _rule))
register(Kernel("backward_gdn", "eager", _backward, why_not, fast_on=("cpu",)))
