"""The one forward that replaces those of the patched layers: project -> mix -> norm -> out.

What is particular to a model family (which Linear modules there are, how gates are made) is in its `Family`; everything
here is common. The layer's own modules are called, so LoRA, quantized layers and hooks keep working, and the cache is
transformers' own: convolution windows ``[B, C, width]`` in the model's dtype, states ``[B, HV, K, V]`` in fp32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.accelerate import force_accelerate_hooks

from .. import registry
from ..caches import rewind
from ..kernels.contract import Raw, Rule, Weights, state_dtype
from ..once import read_once
from ..operators import launch, launch_norm, launch_prologue, launch_step
from ..registry import BackendError, warn_once
from ..upstream import cache_names
from . import packing
from .family import Family

MAX_WIDTH = 8  # of convolutions that the Triton kernels serve


@dataclass(frozen=True)
class Settings:
    """How patched layers run."""

    backend: str = "auto"
    strict: bool = False


class Unserved(Exception):
    """The mixer cannot serve a call; the text says why."""


# -------------------------------------------------------------------------------------------------------------- cache


def _store(layer: Any, cache: Any, recent: Tensor, state: Tensor | None) -> None:
    """Move the cache on: its window to `recent`, its recurrent state to `state` unless that has been done in place.

    Nothing here asks for memory once the first of the two has moved, so that a call that raises has moved none. On a
    first call the window comes last: with it the cache says that it holds something.
    """
    states = cache.layers[layer.layer_idx]
    if state is not None:
        cache.update_recurrent_state(state, layer.layer_idx)
    if not states.has_previous_state[0]:
        cache.update_conv_state(recent, layer.layer_idx, conv_kernel_size=layer.conv1d.weight.shape[2])
    else:
        states.conv_states[0].copy_(recent)  # in place, so that its address stays what CUDA graphs know


def _check_cache(family: Family, layer: Any, states: Any, shape: tuple[int, ...], q: Tensor) -> None:
    """Raise ValueError unless what the cache holds fits `shape`, the recurrent state's, and q ``[B, T, HK, K]``."""
    channels = layer.conv1d.weight.shape[0]
    window, state = states.conv_states[0], states.recurrent_states[0]
    here = f"{family.name} layer {layer.layer_idx}: the cache's"
    if tuple(state.shape) != shape or state.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{here} recurrent state must be [sequences, HV, K, V] = {list(shape)} of torch.float32, got "
            f"{list(state.shape)} of {state.dtype}; a cache serves the batch it was filled with"
        )
    if tuple(window.shape[:2]) != (len(q), channels) or window.dtype != q.dtype:
        raise ValueError(
            f"{here} convolution window must be [B, C, width] = [{len(q)}, {channels}, "
            f"{layer.conv1d.weight.shape[2]}] of {q.dtype}, got {list(window.shape)} of {window.dtype}"
        )
    for name, held in (("recurrent state", state), ("convolution window", window)):
        if held.device != q.device:
            raise ValueError(f"{here} {name} is on {held.device}, the hidden states are on {q.device}")


# ------------------------------------------------------------------------------------------------ between projections


def _plain(raw: Raw, weights: Weights, rule: Rule) -> bool:
    """Whether convolution and gates are those that every backend's kernels have."""
    return rule.activation == "silu" and raw.a is not None and weights.conv.shape[1] <= MAX_WIDTH


def _beside(kernel: registry.Kernel, op: str, serves: bool) -> registry.Kernel:
    """The kernel of `op` that belongs to the backend of `kernel`; the eager one where that has none that serves."""
    found = (registry.find(op, kernel.backend) if serves else None) or registry.find(op, "eager")
    assert found is not None
    return found


def _steps(
    family: Family, kernel: registry.Kernel, length: int, raw: Raw, weights: Weights, rule: Rule, states: Any
) -> registry.Kernel | None:
    """The kernel that does all between the projections at once, where the next few tokens of a cache let it."""
    if length > kernel.max_tokens or weights.norm is None:
        return None
    if not isinstance(rule.gate, str) or not _plain(raw, weights, rule):
        return None
    if not (states.conv_states[0].is_contiguous() and states.recurrent_states[0].is_contiguous()):
        return None
    return registry.find(f"step_{family.op}", kernel.backend)


def _request(family: Family, settings: Settings, layer: Any, raw: Raw, weights: Weights) -> tuple[Any, ...]:
    """What the registry is asked."""
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*raw, *weights))
    return raw.q.device.type, raw.q.dtype, (*family.dims(layer),), settings.backend, needs_grad


def _advance(
    family: Family,
    settings: Settings,
    layer: Any,
    raw: Raw,
    cache: Any,
    cu_seqlens: Tensor | None,
    real: Tensor | None,
) -> Tensor:
    """Everything between the projections: ``[B, T, HV V]``."""
    _, v_heads, k_dim, v_dim = family.dims(layer)
    batch, length = raw.q.shape[:2]
    states = None if cache is None else cache.layers[layer.layer_idx]
    state = states.recurrent_states[0] if states is not None and states.has_previous_state[0] else None
    weights, rule = family.weights(layer), family.rule(layer)
    if state is not None:
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        _check_cache(family, layer, states, (sequences, v_heads, k_dim, v_dim), raw.q)
    request = _request(family, settings, layer, raw, weights)
    needs_grad = request[-1]
    kernel = registry.select(f"recurrent_{family.op}", *request)
    if states is not None and state is not None and cu_seqlens is None and real is None and not needs_grad:
        step = _steps(family, kernel, length, raw, weights, rule, states)
        if step is not None:
            return launch_step(step, raw, weights, rule, states.conv_states[0], state).flatten(2)
    if length > kernel.max_tokens:
        kernel = registry.select(f"chunk_{family.op}", *request)
    window, keep = None, 0
    if states is not None:
        window = states.conv_states[0] if states.has_previous_state[0] else None
        keep = weights.conv.shape[1] if window is None else window.shape[2]
    *inputs, recent = launch_prologue(
        _beside(kernel, f"prologue_{family.op}", _plain(raw, weights, rule)), raw, weights, rule,
        window=window, keep=keep, cu_seqlens=cu_seqlens, lengths=None if real is None else real.sum(1),
    )  # fmt: skip
    inplace = kernel.op.startswith("recurrent") and state is not None and not needs_grad and state.is_contiguous()
    o, final = launch(
        kernel, *inputs, scale=k_dim**-0.5, initial_state=state, cu_seqlens=cu_seqlens, qk_l2norm=False,
        inplace=inplace,
    )  # fmt: skip
    if recent is not None:
        _store(layer, cache, recent, None if inplace else final)
    if weights.norm is None:
        norm, z = getattr(layer, family.norm_name), raw.z.reshape(o.shape)
        return norm(o.flatten(0, -2), z.flatten(0, -2)).view(batch, length, -1)
    norm = _beside(kernel, "gated_norm", isinstance(rule.gate, str))
    return launch_norm(norm, o, raw.z, weights.norm, rule).flatten(2)


# ------------------------------------------------------------------------------------------------------------- forward


def _order(mask: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """How tokens are moved to the front of their rows and padding behind them.

    Args:
        mask: ``[B, T]``, 0 for padding.
        x: hidden states ``[B, T, hidden]``.

    Returns:
        Where each place's token is from, ``[B, T, 1]``, and which places then hold one, ``[B, T]``.
    """
    if mask.shape != x.shape[:2]:
        raise ValueError(f"attention_mask must be [B, T] = {list(x.shape[:2])}, got {list(mask.shape)}")
    real = mask != 0
    order = real.logical_not().to(torch.uint8).argsort(stable=True, dim=1)
    return order[..., None], real.gather(1, order)


_all_ones = read_once(lambda mask: bool(mask.all()))


def _no_padding(mask: Tensor) -> bool:
    """Whether a mask that is always there says nothing. A single token is never padding, as transformers has it."""
    if mask.shape[1] == 1:
        return True
    return not torch.compiler.is_compiling() and _all_ones(mask)


def _run(
    family: Family, settings: Settings, layer: Any, x: Tensor, cache: Any, *,
    cu_seqlens: Tensor | None = None, real: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The layer on x ``[B, T, hidden]``."""
    mixed = _advance(family, settings, layer, family.raw(layer, x), cache, cu_seqlens, real)
    return getattr(layer, family.output_name)(mixed)


def _padded(family: Family, settings: Settings, layer: Any, x: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
    """The layer on x ``[B, T, hidden]``; what the mask ``[B, T]`` hides is as if it were not there, and gives zeros."""
    if mask is None:
        return _run(family, settings, layer, x, cache)
    order, real = _order(mask, x)
    x = x.gather(1, order.expand_as(x)).masked_fill(~real[..., None], 0.0)
    out = _run(family, settings, layer, x, cache, real=real)
    return torch.zeros_like(out).scatter(1, order.expand_as(out), out.masked_fill(~real[..., None], 0.0))


def _recorded(family: Family, settings: Settings, layer: Any, x: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
    """`_padded`, so that the tokens can be taken back; with a mask for one row."""
    given = family, settings, layer
    if x.shape[1] > rewind.RECORDED:
        sizes = x.shape[1] - rewind.RECORDED, rewind.RECORDED
        rewind.forget(cache.layers[layer.layer_idx])
        early, late = (None, None) if mask is None else mask.split(sizes, 1)
        x, last = x.split(sizes, 1)
        return torch.cat((_padded(*given, x, cache, early), _recorded(*given, last, cache, late)), 1)
    places = None if mask is None else mask[0] != 0
    out = getattr(layer, family.output_name)(_record(*given, x if places is None else x[:, places], cache, places))
    if places is None:
        return out
    whole = torch.zeros_like(x)
    whole[:, places] = out
    return whole


def _record(family: Family, settings: Settings, layer: Any, x: Tensor, cache: Any, places: Tensor | None) -> Tensor:
    """`_advance` on x ``[B, T, hidden]``, the tokens of some `places`, which are recorded."""
    raw, states = family.raw(layer, x), cache.layers[layer.layer_idx]
    if states.has_previous_state[0]:
        window, state = states.conv_states[0], states.recurrent_states[0]
    else:
        _, v_heads, k_dim, v_dim = family.dims(layer)
        window = raw.q.new_zeros(len(x), *family.weights(layer).conv.shape)
        state = raw.q.new_zeros(len(x), v_heads, k_dim, v_dim, dtype=state_dtype(raw.q.dtype))
    past = rewind.before(states, window, state, x.shape[1])
    mixed = _advance(family, settings, layer, raw, cache, None, None)
    past.step = past.step or _replay(family, settings, layer, raw, states)
    if past.step is None:
        rewind.forget(states)
    else:
        rewind.after(states, past, raw, places)
    return mixed


def _replay(family: Family, settings: Settings, layer: Any, raw: Raw, states: Any) -> rewind.Step | None:
    """What lets tokens like these into a window and a state once more; None where no step kernel serves them."""
    weights, rule = family.weights(layer), family.rule(layer)
    recurrent = registry.select(f"recurrent_{family.op}", *_request(family, settings, layer, raw, weights))
    kernel = _steps(family, recurrent, 1, raw, weights, rule, states)
    return None if kernel is None else lambda raw, *states: kernel.fn(raw, weights, rule, *states)


def _check_served(layer: Any, cache: Any, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise Unserved for calls that belong to the original forward."""
    if torch.compiler.is_exporting():
        raise Unserved("torch.export traces the original forward")
    if kwargs.get("seq_idx") is not None and kwargs.get("cu_seq_lens_q") is None and torch.compiler.is_compiling():
        raise Unserved("bounds of packed sequences are read off seq_idx by the host; give cu_seq_lens_q when compiling")
    if cache is not None and not hasattr(cache.layers[layer.layer_idx], "recurrent_states"):
        raise Unserved(f"layer {layer.layer_idx} of the {type(cache).__name__} holds no recurrent state")


def make_forward(family: Family, original: Callable[..., Tensor], settings: Settings) -> Callable[..., Tensor]:
    """The forward that stands in for `original` on a family's class, with the same arguments and result."""

    @force_accelerate_hooks(list(family.direct))
    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        cache = cache_names.take(kwargs, cache)  # callers may use the name of another version
        try:
            _check_served(self, cache, attention_mask, kwargs)
        except Unserved as reason:
            if settings.strict:
                raise BackendError(f"{family.name}: hf_gdn cannot serve this call: {reason}") from None
            warn_once(f"{family.name}: the original forward runs: {reason}")
            return original(self, hidden_states, cache, attention_mask, **kwargs)
        if attention_mask is not None and family.masks_always and attention_mask.shape == hidden_states.shape[:2]:
            attention_mask = None if _no_padding(attention_mask) else attention_mask
        given, cu_seqlens = (family, settings, self), packing.bounds(hidden_states, kwargs)
        states = None if cache is None else cache.layers[self.layer_idx]
        if states is not None and states.record_past:
            rows = 1 if attention_mask is None else len(attention_mask)
            if cu_seqlens is None and rows == 1 and not torch.is_grad_enabled():
                return _recorded(*given, hidden_states, cache, attention_mask)
            rewind.forget(states)
        if cu_seqlens is None:
            return _padded(*given, hidden_states, cache, attention_mask)
        if attention_mask is not None:  # bounds count padding; there it is made zero
            hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
        packed = hidden_states.reshape(1, -1, hidden_states.shape[2])
        return _run(*given, packed, cache, cu_seqlens=cu_seqlens).reshape(hidden_states.shape)

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]  # others check names by it
    return forward
