"""Record the tokens of a call in its cache, so that they can be rolled back (`hf_gdn.caches.rollback`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..caches import rollback
from ..kernels.contract import Projections, state_dtype
from .mixer import LayerCall, mix, step_kernel
from .padding import run_padded


def run_recorded(call: LayerCall, x: Tensor, mask: Tensor | None) -> Tensor:
    """`run_padded` for one row; its last tokens, up to `rollback.RECORDED`, can be rolled back afterwards."""
    if x.shape[1] > rollback.RECORDED:
        sizes = x.shape[1] - rollback.RECORDED, rollback.RECORDED
        rollback.discard(call.states)
        early, late = (None, None) if mask is None else mask.split(sizes, 1)
        x, last = x.split(sizes, 1)
        return torch.cat((run_padded(call, x, early), run_recorded(call, last, late)), 1)
    real = None if mask is None else mask[0] != 0
    out = call.output(_mix_recorded(call, x if real is None else x[:, real], real))
    if real is None:
        return out
    whole = torch.zeros_like(x)
    whole[:, real] = out
    return whole


def _mix_recorded(call: LayerCall, x: Tensor, real: Tensor | None) -> Tensor:
    """`mix` on x ``[1, t, hidden]`` with recording. `real` ``[T]`` marks which positions of the call are tokens."""
    projected, states = call.project(x), call.states
    plan, weights = call.prepare(projected)
    if call.continues:
        conv_state, state = states.conv_states[0], states.recurrent_states[0]
    else:
        dims = plan.dims
        conv_state = projected.q.new_zeros(len(x), *weights.conv.shape)
        shape = len(x), dims.num_v_heads, dims.head_k_dim, dims.head_v_dim
        state = projected.q.new_zeros(shape, dtype=state_dtype(projected.q.dtype))
    history = rollback.begin_recording(states, conv_state, state, x.shape[1])
    mixed = mix(call, projected)
    history.replay = history.replay or _replay(call, projected)
    if history.replay is None:
        rollback.discard(states)
    else:
        rollback.record(states, history, projected, real)
    return mixed


def _replay(call: LayerCall, projected: Projections) -> rollback.Replay | None:
    """The function that replays such tokens; None if there is no step kernel."""
    plan, weights = call.prepare(projected)
    kernel, spec = step_kernel(plan, 1, call.states), plan.spec
    return None if kernel is None else lambda projected, *states: kernel.fn(projected, weights, spec, *states)
