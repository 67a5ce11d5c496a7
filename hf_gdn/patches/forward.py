"""The forward of all patched layers. It dispatches each call.

`recording` serves tokens that may be rolled back, `padding` serves masked rows, `paged` serves continuous batching. The
first two call `mixer`, which serves everything else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..caches import rollback
from ..errors import BackendError
from ..log import warn_once
from ..upstream import cache_names, paged, seams, tensors
from . import packing
from .families.base import Family
from .handover import Handover
from .mixer import LayerCall, run
from .padding import hides_nothing, run_padded
from .paged import ARGUMENT, run_paged
from .plan import Plans, Settings
from .recording import run_recorded


class Unserved(Exception):
    """The patched forward cannot serve a call; the text says why."""


def _check_served(layer: Any, x: Tensor, cache: Any, kwargs: dict[str, Any]) -> None:
    """Raise Unserved for calls on x ``[B, T, hidden]`` that the original forward must serve."""
    if torch.compiler.is_exporting():
        raise Unserved("torch.export traces the original forward")
    if not torch.compiler.is_compiling() and tensors.is_traced(x):
        raise Unserved("torch.jit.trace, make_fx and FakeTensorMode do not see what kernels write")
    if kwargs.get("seq_idx") is not None and kwargs.get("cu_seq_lens_q") is None and torch.compiler.is_compiling():
        raise Unserved("reading seq_idx needs a host sync, which torch.compile cannot trace; pass cu_seq_lens_q")
    if cache is not None and not hasattr(cache.layers[layer.layer_idx], "recurrent_states"):
        raise Unserved(f"layer {layer.layer_idx} of the {type(cache).__name__} holds no recurrent state")


def make_forward(family: Family, original: Callable[..., Tensor], settings: Settings) -> Callable[..., Tensor]:
    """Make the forward that replaces `original` on a family's class; arguments and result are the same."""
    plans, handover = Plans(family, settings), Handover(family, settings, original)

    @seams.force_accelerate_hooks(family.direct)
    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        cache = cache_names.take(kwargs, cache)  # callers may use the name of another version
        if paged.is_paged(cache):
            return run_paged(LayerCall(plans, self, None), cache, hidden_states, kwargs[ARGUMENT])
        try:
            _check_served(self, hidden_states, cache, kwargs)
        except Unserved as reason:
            if settings.strict:
                raise BackendError(f"{family.name}: hf_gdn cannot serve this call: {reason}") from None
            warn_once(f"{family.name}: the original forward runs: {reason}")
            return original(self, hidden_states, cache, attention_mask, **kwargs)
        if attention_mask is not None and family.masks_always and attention_mask.shape == hidden_states.shape[:2]:
            attention_mask = None if hides_nothing(attention_mask) else attention_mask
        call, cu_seqlens = LayerCall(plans, self, cache), packing.bounds(hidden_states, kwargs)
        if call.states is not None and call.states.record_past:
            rows = 1 if attention_mask is None else len(attention_mask)
            if rollback.records(call.states) and cu_seqlens is None and rows == 1 and not torch.is_grad_enabled():
                return run_recorded(call, hidden_states, attention_mask)
            rollback.discard(call.states)
        if cu_seqlens is None:
            faster = handover.reason(self, hidden_states) if attention_mask is None else None
            if faster is not None:
                warn_once(f"{family.name}: the original forward runs: {faster}")
                return original(self, hidden_states, cache, attention_mask, **kwargs)
            return run_padded(call, hidden_states, attention_mask)
        if attention_mask is not None:  # cu_seqlens counts padded positions too, so set their hidden states to zero
            hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
        packed = hidden_states.reshape(1, -1, hidden_states.shape[2])
        return run(call, packed, cu_seqlens=cu_seqlens).reshape(hidden_states.shape)

    forward.plans = plans  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]  # libraries inspect argument names
    return forward
