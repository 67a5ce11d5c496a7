"""Padded rows: move the tokens of each row to its front, so that no token can read the padding behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..once import read_once
from .mixer import LayerCall, run

_all_ones = read_once(lambda mask: bool(mask.all()))


def hides_nothing(mask: Tensor) -> bool:
    """Whether a mask ``[B, T]`` is known to hide nothing. A single token is never padding, as in transformers."""
    if mask.shape[1] == 1:
        return True
    return not torch.compiler.is_compiling() and _all_ones(mask)


def _order(mask: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the permutation that moves the tokens of each row to its front.

    Args:
        mask: ``[B, T]``, 0 for padding.
        x: hidden states ``[B, T, hidden]``.

    Returns:
        The source position of each position, ``[B, T, 1]``, and which positions then hold a token, ``[B, T]``.
    """
    if mask.shape != x.shape[:2]:
        raise ValueError(f"attention_mask must be [B, T] = {list(x.shape[:2])}, got {list(mask.shape)}")
    real = mask != 0
    order = real.logical_not().to(torch.uint8).argsort(stable=True, dim=1)
    return order[..., None], real.gather(1, order)


def run_padded(call: LayerCall, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run the layer on x ``[B, T, hidden]``. Tokens that the mask ``[B, T]`` hides have no effect and return zeros."""
    if mask is None:
        return run(call, x)
    order, real = _order(mask, x)
    x = x.gather(1, order.expand_as(x)).masked_fill(~real[..., None], 0.0)
    out = run(call, x, real=real)
    return torch.zeros_like(out).scatter(1, order.expand_as(out), out.masked_fill(~real[..., None], 0.0))
