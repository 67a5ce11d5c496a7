"""Calls whose tokens a cache records, so that they can be rolled back (`hf_gdn.caches.rewind`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..caches import rewind
from ..kernels.contract import Raw, state_dtype
from .mixer import LayerCall, mix, step_kernel
from .padding import run_padded


def run_recorded(call: LayerCall, x: Tensor, mask: Tensor | None) -> Tensor:
    """`run_padded` for one row, whose last tokens can then be rolled back."""
    if x.shape[1] > rewind.RECORDED:
        sizes = x.shape[1] - rewind.RECORDED, rewind.RECORDED
        rewind.forget(call.states)
        early, late = (None, None) if mask is None else mask.split(sizes, 1)
        x, last = x.split(sizes, 1)
        return torch.cat((run_padded(call, x, early), run_recorded(call, last, late)), 1)
    places = None if mask is None else mask[0] != 0
    out = call.output(_mix_recorded(call, x if places is None else x[:, places], places))
    if places is None:
        return out
    whole = torch.zeros_like(x)
    whole[:, places] = out
    return whole


def _mix_recorded(call: LayerCall, x: Tensor, places: Tensor | None) -> Tensor:
    """`mix` on x ``[1, T, hidden]``, the tokens of some `places`, which are recorded."""
    raw, states = call.project(x), call.states
    plan, weights = call.prepare(raw)
    if call.continues:
        window, state = states.conv_states[0], states.recurrent_states[0]
    else:
        dims = plan.dims
        window = raw.q.new_zeros(len(x), *weights.conv.shape)
        shape = len(x), dims.num_v_heads, dims.head_k_dim, dims.head_v_dim
        state = raw.q.new_zeros(shape, dtype=state_dtype(raw.q.dtype))
    past = rewind.before(states, window, state, x.shape[1])
    mixed = mix(call, raw)
    past.step = past.step or _replay(call, raw)
    if past.step is None:
        rewind.forget(states)
    else:
        rewind.after(states, past, raw, places)
    return mixed


def _replay(call: LayerCall, raw: Raw) -> rewind.Step | None:
    """What replays tokens like these into a convolution state and a recurrent state; None without a step kernel."""
    plan, weights = call.prepare(raw)
    kernel, rule = step_kernel(plan, 1, call.states), plan.rule
    return None if kernel is None else lambda raw, *states: kernel.fn(raw, weights, rule, *states)
