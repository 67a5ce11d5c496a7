"""The delta rule in chunks, one decay per channel (KDA), from flash-linear-attention."""

from __future__ import annotations

from ...registry import Kernel, register
from .runtime import adapt, why_not_chunk

register(
    Kernel("chunk_kda", "fla", adapt("fla.ops.kda", "chunk_kda"), why_not_chunk, differentiable=True, checked=True)
)
