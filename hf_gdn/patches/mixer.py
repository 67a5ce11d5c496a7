"""Run a patched layer: its projections, the kernels of its plan, and the cache update.

It calls the layer's own modules, so LoRA, quantized layers and hooks keep working. The cache is transformers' own:
convolution states ``[B, C, width]`` in the model's dtype, recurrent states ``[B, HV, K, V]`` in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import refuse_forward_mode
from ..kernels.contract import Projections, Weights
from ..operators import call_delta_rule, call_norm, call_prologue, call_step
from ..registry import Kernel
from .plan import KernelPlan, Plans


class LayerCall:
    """One call of a patched layer.

    Attributes:
        layer: the module.
        cache: transformers' cache, or None.
        states: the layer's entry in the cache, or None.
    """

    def __init__(self, plans: Plans, layer: Any, cache: Any) -> None:
        self._plans, self.family, self.layer, self.cache = plans, plans.family, layer, cache
        self.states: Any = None if cache is None else cache.layers[layer.layer_idx]

    @property
    def continues(self) -> bool:
        """Whether the cache already holds tokens of this layer."""
        return self.states is not None and self.states.has_previous_state[0]

    def project(self, x: Tensor) -> Projections:
        """Outputs of the input projections for x ``[B, T, hidden]``, contiguous in their last dimensions."""
        projected = self.family.project(self.layer, x)
        for part in projected:
            if part is not None and part.stride()[-1] != 1:  # of a layer that computes (W x^T)^T, as quantized ones do
                rows = [y if y is None or y.stride()[-1] == 1 else y.contiguous() for y in projected]
                return Projections(*rows)  # type: ignore[arg-type]
        return projected

    def output(self, mixed: Tensor) -> Tensor:
        """Apply the output projection to ``[B, T, HV V]``."""
        return getattr(self.layer, self.family.output_name)(mixed)

    def prepare(self, projected: Projections) -> tuple[KernelPlan, Weights]:
        """The kernels for these inputs, and the layer's weights."""
        return self._plans.of(self.layer, projected)


def run(call: LayerCall, x: Tensor, *, cu_seqlens: Tensor | None = None, real: Tensor | None = None) -> Tensor:
    """Run the whole layer on x ``[B, T, hidden]``; arguments as for `mix`."""
    return call.output(mix(call, call.project(x), cu_seqlens, real))


def mix(
    call: LayerCall, projected: Projections, cu_seqlens: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """Run everything between the projections and update the cache. Returns ``[B, T, HV V]``.

    Args:
        call: the layer and its cache.
        projected: outputs of the input projections.
        cu_seqlens: ``[N + 1]`` boundaries of sequences packed in one row.
        real: ``[B, T]``, false for padding, which must be at the end of rows.
    """
    refuse_forward_mode()
    plan, weights = call.prepare(projected)
    batch, length = projected.q.shape[:2]
    states = call.states
    state = states.recurrent_states[0] if call.continues else None
    if state is not None:
        _check_cache(call, plan, projected.q, weights, batch if cu_seqlens is None else len(cu_seqlens) - 1)
        step = step_kernel(plan, length, states) if cu_seqlens is None and real is None else None
        if step is not None:
            conv_state, asked = states.conv_states[0], plan.asked
            return call_step(step, projected, weights, plan.spec, conv_state, state, asked).flatten(2)
    kernel, prologue, norm = plan.route(length)
    conv_state, keep = None, 0
    if states is not None:
        conv_state = states.conv_states[0] if state is not None else None
        keep = weights.conv.shape[1] if conv_state is None else conv_state.shape[2]
    *inputs, recent = call_prologue(
        prologue,
        projected,
        weights,
        plan.spec,
        conv_state=conv_state,
        keep=keep,
        cu_seqlens=cu_seqlens,
        lengths=None if real is None else real.sum(1),
        asked=plan.asked,
        needs_grad=plan.needs_grad,
    )
    inplace = kernel is plan.few.delta_rule and state is not None and not plan.needs_grad and state.is_contiguous()
    o, final = call_delta_rule(
        kernel,
        *inputs,
        scale=plan.dims.head_k_dim**-0.5,
        initial_state=state,
        cu_seqlens=cu_seqlens,
        qk_l2norm=False,
        inplace=inplace,
        needs_grad=plan.needs_grad,
        beta_max=plan.spec.beta_scale,
        asked=plan.asked,
    )
    if recent is not None:
        _store(call, recent, None if inplace else final)
    if norm is None or weights.norm is None:
        module, z = getattr(call.layer, call.family.norm_name), projected.z.reshape(o.shape)
        return module(o.flatten(0, -2), z.flatten(0, -2)).view(batch, length, -1)
    return call_norm(norm, o, projected.z, weights.norm, plan.spec, plan.asked, plan.needs_grad).flatten(2)


def step_kernel(plan: KernelPlan, length: int, states: Any) -> Kernel | None:
    """The step kernel for the next `length` tokens of a cache layer; None if no step kernel serves them."""
    serves = length <= plan.few.delta_rule.max_tokens and states.conv_states[0].is_contiguous()
    return plan.step if serves and states.recurrent_states[0].is_contiguous() else None


def _store(call: LayerCall, recent: Tensor, state: Tensor | None) -> None:
    """Write the convolution state `recent` to the cache, and the recurrent state unless it was updated in place.

    All allocations happen before either state is written, so an exception leaves the cache unchanged. On the first
    call, the convolution state is written last, because it marks the layer as initialized.
    """
    layer, states = call.layer, call.states
    if state is not None:
        call.cache.update_recurrent_state(state, layer.layer_idx)
    if not states.has_previous_state[0]:
        call.cache.update_conv_state(recent, layer.layer_idx, conv_kernel_size=layer.conv1d.weight.shape[2])
    else:
        states.conv_states[0].copy_(recent)  # in place: captured CUDA graphs hold its address


def _check_cache(call: LayerCall, plan: KernelPlan, q: Tensor, weights: Weights, sequences: int) -> None:
    """Raise ValueError unless the cache's states fit the layer and q ``[B, T, HK, K]``."""
    layer, states = call.layer, call.states
    shape = (sequences, plan.dims.num_v_heads, plan.dims.head_k_dim, plan.dims.head_v_dim)
    channels, width = weights.conv.shape
    conv_state, state = states.conv_states[0], states.recurrent_states[0]
    here = f"{call.family.name} layer {layer.layer_idx}: the cache's"
    if tuple(state.shape) != shape or state.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{here} recurrent state must be [sequences, HV, K, V] = {list(shape)} of torch.float32, got "
            f"{list(state.shape)} of {state.dtype}; a cache serves the batch it was filled with"
        )
    if tuple(conv_state.shape[:2]) != (len(q), channels) or conv_state.dtype != q.dtype:
        raise ValueError(
            f"{here} convolution state must be [B, C, width] = [{len(q)}, {channels}, "
            f"{width}] of {q.dtype}, got {list(conv_state.shape)} of {conv_state.dtype}"
        )
    for name, held in (("recurrent state", state), ("convolution state", conv_state)):
        if held.device != q.device:
            raise ValueError(f"{here} {name} is on {held.device}, the hidden states are on {q.device}")
