"""Helpers of the eager delta rules: the initial state, and sequences packed along T."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..contract import state_dtype


def starting_state(v: Tensor, k_dim: int, initial_state: Tensor | None) -> Tensor:
    """The state before the first token, ``[B, HV, K, V]`` in the state's dtype; zeros if none is given."""
    dtype = state_dtype(v.dtype)
    if initial_state is not None:
        return initial_state.to(dtype)
    return torch.zeros(v.shape[0], v.shape[2], k_dim, v.shape[3], dtype=dtype, device=v.device)


def one_after_another(
    fn: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    token_states: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Call a delta rule for each packed sequence. Arguments and results are those of one call for all sequences."""
    bounds = cu_seqlens.tolist()
    outputs, states = [], []
    for n, (first, last) in enumerate(pairwise(bounds)):
        state = None if initial_state is None else initial_state[n : n + 1]
        if token_states is not None:
            kwargs["token_states"] = token_states[:, first:last]
        o, state = fn(*(x[:, first:last] for x in (q, k, v, g, beta)), initial_state=state, **kwargs)
        outputs.append(o)
        states.append(state)
    if kwargs.get("inplace"):
        return torch.cat(outputs, 1), initial_state
    return torch.cat(outputs, 1), torch.cat(states, 0)
