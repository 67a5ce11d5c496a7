"""Boundaries of packed sequences, from the keyword arguments of a layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import check_bounds
from ..once import read_once


def bounds(x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the boundaries ``[N + 1]`` of sequences packed in x ``[B, T, hidden]``, as indices into its B T tokens.

    They come from ``cu_seq_lens_q`` (B = 1), else from ``seq_idx`` ``[1, T]`` or ``[B, T]``. None if neither is given.

    Raises:
        ValueError: ``cu_seq_lens_q`` or ``seq_idx`` does not fit x.
    """
    cu_seqlens, seq_idx = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
    batch, length = x.shape[:2]
    if cu_seqlens is None:
        if seq_idx is None:
            return None
        cu_seqlens = _of_indices(seq_idx, batch, length)
    elif batch != 1:
        raise ValueError(f"cu_seq_lens_q needs hidden states [1, T, hidden], got {list(x.shape)}")
    if not torch.compiler.is_compiling():
        check_bounds(cu_seqlens, batch * length)
    return cu_seqlens


@read_once
def _of_indices(seq_idx: Tensor, batch: int, length: int) -> Tensor:
    if seq_idx.ndim != 2 or seq_idx.shape[0] not in (1, batch) or seq_idx.shape[1] != length:
        wanted = f"[1, T] = [1, {length}]" + (f" or [B, T] = [{batch}, {length}]" if batch > 1 else "")
        raise ValueError(f"seq_idx must be {wanted} beside hidden states [B, T, hidden], got {list(seq_idx.shape)}")
    rows = seq_idx.expand(batch, length)
    begins = F.pad(rows[:, 1:] != rows[:, :-1], (1, 0), value=True).flatten().nonzero().squeeze(1)
    return F.pad(begins, (0, 1), value=batch * length).to(torch.int32)
