"""L2 normalisation around the gradients of a chunk op, in PyTorch: two passes over q and k."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..contract import Gradients


def _normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| over the last dimension, rounded once to x's dtype, and 1 / |x| ``[..., 1]`` in fp32."""
    exact = x.float()
    length = torch.rsqrt(exact.square().sum(-1, keepdim=True) + 1e-6)
    return (exact * length).to(x.dtype), length


def _backward(y: Tensor, length: Tensor, d_y: Tensor) -> Tensor:
    """The gradient of x, from y = x / |x|, 1 / |x| and the gradient of y."""
    exact, d = y.float(), d_y.float()
    return ((d - exact * (exact * d).sum(-1, keepdim=True)) * length).to(y.dtype)


def outside(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Serve ``qk_l2norm=True`` around a function for normalised q and k: models come with these."""

    @functools.wraps(backward)
    def call(q: Tensor, k: Tensor, *args, qk_l2norm: bool = False, **options) -> Gradients:
        if not qk_l2norm:
            return backward(q, k, *args, **options)
        (qn, q_length), (kn, k_length) = _normalized(q), _normalized(k)
        found = backward(qn, kn, *args, **options)
        return found._replace(q=_backward(qn, q_length, found.q), k=_backward(kn, k_length, found.k))

    return call
