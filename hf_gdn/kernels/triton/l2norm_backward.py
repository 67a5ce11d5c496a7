"""L2 normalisation around the gradients of a chunk op, in PyTorch: two passes over q and k."""

from __future__ import annotations

import torch
from torch import Tensor


def normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| over the last dimension, rounded once to x's dtype, and 1 / |x| ``[..., 1]`` in fp32."""
    exact = x.float()
    length = torch.rsqrt(exact.square().sum(-1, keepdim=True) + 1e-6)
    return (exact * length).to(x.dtype), length


def l2norm_backward(y: Tensor, length: Tensor, d_y: Tensor) -> Tensor:
    """The gradient of x, from y = x / |x|, 1 / |x| and the gradient of y."""
    exact, d = y.float(), d_y.float()
    return ((d - exact * (exact * d).sum(-1, keepdim=True)) * length).to(y.dtype)
