"""Padded rows: tokens are moved to the front of their rows, so that padding follows them and is read by nobody."""

from __future__ import annotations

import torch
from torch import Tensor

from ..once import read_once
from .mixer import LayerCall, run

_all_ones = read_once(lambda mask: bool(mask.all()))


def hides_nothing(mask: Tensor) -> bool:
    """Whether a mask that a model always gives says nothing. A single token is never padding, as in transformers."""
    if mask.shape[1] == 1:
        return True
    return not torch.compiler.is_compiling() and _all_ones(mask)


def _order(mask: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """How tokens are moved to the front of their rows and padding behind them.

    Args:
        mask: ``[B, T]``, 0 for padding.
        x: hidden states ``[B, T, hidden]``.

    Returns:
        Where each place's token is from, ``[B, T, 1]``, and which places then hold one, ``[B, T]``.
    """
    if mask.shape != x.shape[:2]:
        raise ValueError(f"attention_mask must be [B, T] = {list(x.shape[:2])}, got {list(mask.shape)}")
    real = mask != 0
    order = real.logical_not().to(torch.uint8).argsort(stable=True, dim=1)
    return order[..., None], real.gather(1, order)


def run_padded(call: LayerCall, x: Tensor, mask: Tensor | None) -> Tensor:
    """The layer on x ``[B, T, hidden]``; tokens that the mask ``[B, T]`` hides have no effect, and give zeros."""
    if mask is None:
        return run(call, x)
    order, real = _order(mask, x)
    x = x.gather(1, order.expand_as(x)).masked_fill(~real[..., None], 0.0)
    out = run(call, x, real=real)
    return torch.zeros_like(out).scatter(1, order.expand_as(out), out.masked_fill(~real[..., None], 0.0))
