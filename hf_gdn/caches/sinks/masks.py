"""Attention masks for `SinkCache`: read the user's padding mask, and build the mask of an attention implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NO_MASK = (
    "attention implementation {!r} does not take the mask that a SinkCache needs here; "
    "load the model with attn_implementation='sdpa' or 'eager'"
)


def check_implementation(kind: str) -> None:
    """Raise ValueError for an attention implementation that does not take the masks of a `SinkCache`."""
    if kind not in ("sdpa", "eager") and "flash_attention" not in kind:
        raise ValueError(_NO_MASK.format(kind))


def real_columns(mask: Any, batch: int, length: int, columns: int | None, device: torch.device) -> Tensor | None:
    """Which of the new columns are tokens, ``[B, T]``; None if there is no mask.

    Args:
        mask: the model's attention mask: ``[B, columns + T]`` or ``[B, T]``, or the dict that ``generate`` made of it.
        batch, length: B and T.
        columns: columns read before; None if unknown.
        device: device of the result.

    Raises:
        ValueError: the mask has another shape.
    """
    if isinstance(mask, dict):
        mask = mask.get("linear_attention")
    if mask is None:
        return None
    wanted = f"[B, T] = [{batch}, {length}]" + (
        f" or [{batch}, {columns + length}] including the tokens in the cache" if columns else ""
    )
    fits = mask.ndim == 2 and mask.shape[0] == batch
    if not fits or (columns is not None and mask.shape[1] not in (length, columns + length)):
        raise ValueError(f"attention_mask must be {wanted}, got {list(mask.shape)}")
    return mask[:, -length:].to(device) != 0


def as_mask(seen: Tensor | None, real: Tensor | None, plain: bool, kind: str, dtype: torch.dtype) -> Tensor | None:
    """Convert the boolean mask seen ``[B, T, keys]`` to the form that an attention implementation takes.

    `plain`: the mask only is causal and hides padding. `real` ``[B, T]`` marks tokens; None if there is no padding.
    """
    if seen is None:
        return None
    if kind == "eager":
        return torch.where(seen[:, None], 0.0, torch.finfo(dtype).min).to(dtype)
    if plain and (real is None or kind != "sdpa"):
        return real  # without a mask, kernels are causal
    if kind == "sdpa":
        return seen[:, None]
    if seen.shape[1] > 1:
        raise ValueError(_NO_MASK.format(kind))
    return seen[:, 0]
