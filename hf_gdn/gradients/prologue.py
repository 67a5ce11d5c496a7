"""Everything before the delta rule in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..dispatch import run_or_fall_back
from ..kernels.contract import DeltaRuleInputs, LayerSpec, Projections, Weights
from .common import backward_kernel, define, once

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor conv, Tensor? conv_bias, Tensor A_log, Tensor dt_bias, "
    "Tensor? cu_seqlens, Tensor? lengths, Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_g, Tensor d_beta, "
    "float? lower_bound, bool decay_in_dtype, float beta_scale, str backend, str asked) "
    "-> (Tensor qkv, Tensor a, Tensor b, Tensor conv, Tensor A_log, Tensor dt_bias, Tensor conv_bias)"
)


def _define(op: str) -> Any:
    """Define the operator of a prologue's gradients. That of a bias which is not there is empty."""
    backward_op = registry.backward_of(op)
    assert backward_op is not None

    def run(q, k, v, a, b, conv, conv_bias, A_log, dt_bias, cu_seqlens, lengths, *rest):
        *gradients, lower_bound, decay_in_dtype, beta_scale, backend, asked = rest
        projected = Projections(q, k, v, a, b, z=v)  # whose z plays no part
        weights = Weights(conv, conv_bias, A_log, dt_bias, None)
        spec = LayerSpec(lower_bound, decay_in_dtype, beta_scale)
        heads = v.shape[2] * v.shape[3], v.shape[4]
        kernel, asked = backward_kernel(backward_op, q, (q.shape[2], heads[0], q.shape[3], heads[1]), backend, asked)
        given = [x.contiguous() for x in gradients]
        found = run_or_fall_back(
            kernel,
            asked,
            q,
            heads,
            lambda kernel: kernel.fn(projected, weights, spec, *given, cu_seqlens=cu_seqlens, lengths=lengths),
        )
        return *found[:-1], q.new_empty(0) if conv_bias is None else found.conv_bias

    def fake(q, k, v, a, b, conv, conv_bias, A_log, dt_bias, *_):
        made = [x.new_empty(x.shape) for x in (a, b, conv, A_log, dt_bias)]
        bias = q.new_empty(0) if conv_bias is None else conv_bias.new_empty(conv_bias.shape)
        return q.new_empty((*q.shape[:2], conv.shape[0])), *made, bias

    return define(backward_op, run, _SCHEMA, fake)


BACKWARD_PROLOGUE_OPERATORS = {op: _define(op) for op in ("prologue_gdn", "prologue_kda")}


def prologue_with_backward(op: str, operator: Callable[..., Any]) -> Callable[..., DeltaRuleInputs]:
    """The operator of a prologue as a function that autograd can go through.

    It is called as ``function(projected, weights, spec, keep, cu_seqlens, lengths, backend, asked)``, and does not
    continue a convolution state. The one that it returns has no gradient.
    """
    differentiated = once(op, BACKWARD_PROLOGUE_OPERATORS[op])

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(qkv: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            qkv, q, k, v, a, b, _, conv, conv_bias, A_log, dt_bias, *rest = inputs
            *spec, _, _, cu_seqlens, lengths, backend, asked = rest
            ctx.save_for_backward(q, k, v, a, b, conv, conv_bias, A_log, dt_bias, cu_seqlens, lengths)
            ctx.is_joined, ctx.options = qkv is not None, (*spec, backend, asked)
            ctx.mark_non_differentiable(output[5])

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
            saved = ctx.saved_tensors
            qkv, has_bias = saved[:3], saved[6] is not None
            d_qkv, a, b, conv, A_log, dt_bias, bias = differentiated(*saved, *gradients[:5], *ctx.options)
            if ctx.is_joined:  # q, k and v are views of it
                of_qkv: tuple[Any, ...] = d_qkv, None, None, None
            else:
                parts = d_qkv.split_with_sizes([x.shape[2:].numel() for x in qkv], -1)
                of_qkv = None, *(part.unflatten(2, x.shape[2:]) for part, x in zip(parts, qkv))
            return *of_qkv, a, b, None, conv, bias if has_bias else None, A_log, dt_bias, *[None] * 9

    def call(projected, weights, spec, keep, cu_seqlens, lengths, backend, asked):
        options = *spec[:3], None, keep, cu_seqlens, lengths, backend, asked
        *made, recent = Function.apply(projected.qkv, *projected[:6], *weights[:4], *options)
        return DeltaRuleInputs(*made, recent if keep else None)

    return call
