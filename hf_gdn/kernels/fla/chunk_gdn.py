"""The gated delta rule in chunks, one decay per head (GDN), from flash-linear-attention."""

from __future__ import annotations

from ...registry import Kernel, register
from .runtime import adapt, why_not_chunk

register(
    Kernel(
        "chunk_gdn",
        "fla",
        adapt("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
        why_not_chunk,
        differentiable=True,
        checked=True,
    )
)
