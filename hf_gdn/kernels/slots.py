"""States in slots of a pool, for kernels that do not index the pool themselves: gather before the call, scatter after.

`contract.Slots` says which slots a call reads and writes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Kernel
from .contract import LayerSpec, Projections, Slots, Weights


def read(pool: Tensor, slots: Slots) -> Tensor:
    """The contents of the slots, a copy ``[N, ...]``; zeros where a sequence has not begun."""
    begun = slots.begun.view(-1, *[1] * (pool.dim() - 1))
    # Not a product: what an unused slot holds may be infinite or NaN.
    return torch.where(begun, pool.index_select(0, slots.rows), 0.0)


def write(pool: Tensor, slots: Slots, new: Tensor, cu_seqlens: Tensor | None) -> None:
    """Write ``[N, ...]`` to the slots, but for sequences without tokens."""
    if cu_seqlens is not None:
        some = (cu_seqlens.diff() > 0).view(-1, *[1] * (pool.dim() - 1))
        new = torch.where(some, new, pool.index_select(0, slots.rows))
    pool.index_copy_(0, slots.rows, new)


def delta_rule(kernel: Kernel, *inputs: Tensor, initial_state: Tensor, slots: Slots, **options: Any) -> Any:
    """Call a delta-rule kernel with states in slots of the pool `initial_state`. Returns ``(o, pool)``."""
    if kernel.slots:
        return kernel.fn(*inputs, initial_state=initial_state, slots=slots, **options)
    o, final = kernel.fn(*inputs, initial_state=read(initial_state, slots), **options)
    write(initial_state, slots, final, options.get("cu_seqlens"))
    return o, initial_state


def step(
    kernel: Kernel,
    projected: Projections,
    weights: Weights,
    spec: LayerSpec,
    conv_state: Tensor,
    state: Tensor,
    slots: Slots,
) -> Tensor:
    """Call a step kernel with both states in slots of pools."""
    if kernel.slots:
        return kernel.fn(projected, weights, spec, conv_state, state, slots=slots)
    conv_now, state_now = read(conv_state, slots), read(state, slots)
    y = kernel.fn(projected, weights, spec, conv_now, state_now)
    write(state, slots, state_now, None)
    write(conv_state, slots, conv_now, None)
    return y
