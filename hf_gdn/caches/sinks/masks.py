"""Masks on their way into a `SinkCache` and out of it: which columns are tokens, and who sees what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NO_MASK = (
    "a SinkCache cannot tell attention implementation {!r} who sees what here; "
    "load the model with attn_implementation='sdpa' or 'eager'"
)


def check_implementation(kind: str) -> None:
    """Raise ValueError for an attention implementation that takes no mask of ours."""
    if kind not in ("sdpa", "eager") and "flash_attention" not in kind:
        raise ValueError(_NO_MASK.format(kind))


def real_columns(mask: Any, batch: int, length: int, columns: int | None, device: torch.device) -> Tensor | None:
    """Which of the new columns are tokens, ``[B, T]``; None where nothing says that any is not.

    Args:
        mask: as the model was given it: ``[B, columns + T]`` or ``[B, T]``, or masks that ``generate`` made of it.
        batch, length: B and T.
        columns: columns read before, None where that is not known.
        device: of the result.
    """
    if isinstance(mask, dict):
        mask = mask.get("linear_attention")
    if mask is None:
        return None
    wanted = f"[B, T] = [{batch}, {length}]" + (
        f" or [{batch}, {columns + length}] with what was read" if columns else ""
    )
    fits = mask.ndim == 2 and mask.shape[0] == batch
    if not fits or (columns is not None and mask.shape[1] not in (length, columns + length)):
        raise ValueError(f"attention_mask must be {wanted}, got {list(mask.shape)}")
    return mask[:, -length:].to(device) != 0


def as_mask(seen: Tensor | None, real: Tensor | None, plain: bool, kind: str, dtype: torch.dtype) -> Tensor | None:
    """What an attention implementation takes for seen ``[B, T, keys]``.

    `plain` says that it is causal and hides padding, of which there is none where `real` ``[B, T]`` is None.
    """
    if seen is None:
        return None
    if kind == "eager":
        return torch.where(seen[:, None], 0.0, torch.finfo(dtype).min).to(dtype)
    if plain and (real is None or kind != "sdpa"):
        return real  # causal is what kernels do without a mask
    if kind == "sdpa":
        return seen[:, None]
    if seen.shape[1] > 1:
        raise ValueError(_NO_MASK.format(kind))
    return seen[:, 0]
