"""The ops as `torch.library` operators, and functions that call a kernel.

Operators (``torch.ops.hf_gdn.*``) have fake kernels, so `torch.compile(fullgraph=True)` can trace through them. Layers
that are not compiled call kernels directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import registry
from .dispatch import check_bounds, dims_of, run_or_fall_back
from .gradients import call_with_backward, has_backward, norm_with_backward, prologue_with_backward
from .kernels import slots as in_slots
from .kernels.contract import DeltaRuleInputs, LayerSpec, Projections, Slots, Weights, state_dtype
from .upstream.tensors import in_transform

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor{state} initial_state, Tensor? cu_seqlens, "
    "float scale, bool qk_l2norm, float beta_max, str backend, str asked) -> {result}"
)


def _define(op: str, inplace: bool) -> Any:
    """Define the operator of `op`. The in-place variant updates initial_state and returns only o."""

    def run(q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm, beta_max, backend, asked):
        if cu_seqlens is not None:
            check_bounds(cu_seqlens, q.shape[1])
        options = dict(scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, qk_l2norm=qk_l2norm)
        if inplace:
            options["inplace"] = True
        kernel = registry.resolve_cached(op, q.device.type, q.dtype, dims_of(q, v), backend, False, beta_max)
        o, state = run_or_fall_back(
            kernel, asked, q, v.shape[2:], lambda kernel: kernel.fn(q, k, v, g, beta, **options), beta_max=beta_max
        )
        return o if inplace else (o, state)

    def fake(q, k, v, g, beta, initial_state, cu_seqlens, *rest):
        o = v.new_empty(v.shape)
        if inplace:
            return o
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return o, v.new_empty((sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=state_dtype(v.dtype))

    schema = _SCHEMA.format(
        state="(a!)" if inplace else "?", result="Tensor" if inplace else "(Tensor o, Tensor final_state)"
    )
    name = f"hf_gdn::{op}{'_' if inplace else ''}"
    operator = torch.library.custom_op(name, run, mutates_args=("initial_state",) if inplace else (), schema=schema)
    operator.register_fake(fake)
    return operator


OPERATORS = {op: _define(op, False) for op in ("chunk_gdn", "recurrent_gdn", "chunk_kda", "recurrent_kda")}
INPLACE_OPERATORS = {op: _define(op, True) for op in ("recurrent_gdn", "recurrent_kda")}


def _as_operator(kernel: registry.Kernel) -> bool:
    """Whether a kernel is called as an operator: torch.compile traces it, or `torch.func.vmap` gives it tensors."""
    return not kernel.traceable and (torch.compiler.is_compiling() or in_transform())


def call_delta_rule(
    kernel: registry.Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_l2norm: bool,
    inplace: bool = False,
    needs_grad: bool = False,
    beta_max: float = 1.0,
    asked: str = "auto",
    slots: Slots | None = None,
) -> tuple[Tensor, Tensor]:
    """Call a delta-rule kernel: directly, or as an operator if torch.compile cannot trace it or gradients are needed.

    Inputs are not checked (see `dispatch.check`). `beta_max` is that of `registry.Request`; `asked` is the backend that
    the user asked for, in all functions here. Calls with `slots` have no gradients and are not compiled. Returns
    ``(o, final_state)``.
    """
    if slots is not None:
        assert initial_state is not None
        given: dict[str, Any] = dict(
            initial_state=initial_state, slots=slots, scale=scale, cu_seqlens=cu_seqlens, qk_l2norm=qk_l2norm
        )
        return run_or_fall_back(
            kernel,
            asked,
            q,
            v.shape[2:],
            lambda kernel: in_slots.delta_rule(kernel, q, k, v, g, beta, **given),
            beta_max=beta_max,
        )
    if needs_grad and has_backward(kernel):
        return call_with_backward(
            kernel, q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm, beta_max, asked
        )
    if _as_operator(kernel) or (cu_seqlens is not None and torch.compiler.is_compiling()):
        table = INPLACE_OPERATORS if inplace else OPERATORS
        chosen = kernel.backend, asked
        result = table[kernel.op](q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm, beta_max, *chosen)
        return (result, initial_state) if inplace else result  # type: ignore[return-value]
    options = dict(scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, qk_l2norm=qk_l2norm)
    if inplace:
        options["inplace"] = True
    return run_or_fall_back(
        kernel,
        asked,
        q,
        v.shape[2:],
        lambda kernel: kernel.fn(q, k, v, g, beta, **options),
        beta_max=beta_max,
        needs_grad=needs_grad,
    )


_STEP_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor z, Tensor conv, Tensor? conv_bias, Tensor A_log, "
    "Tensor dt_bias, Tensor norm, Tensor(a!) conv_state, Tensor(b!) state, float? lower_bound, bool decay_in_dtype, "
    "float beta_scale, str activation, str gate, bool norm_in_fp32, float eps, str backend, str asked) -> Tensor"
)


def _define_step(op: str) -> Any:
    """Define the operator of a step op. It updates conv_state and state in place."""

    def run(q, k, v, a, b, z, conv, conv_bias, A_log, dt_bias, norm, conv_state, state, *rest):
        *spec, backend, asked = rest
        projected, weights = Projections(q, k, v, a, b, z), Weights(conv, conv_bias, A_log, dt_bias, norm)
        kernel = registry.get(op, backend)
        return call_step(kernel, projected, weights, LayerSpec(*spec), conv_state, state, asked)

    def fake(q, k, v, a, b, z, conv, conv_bias, A_log, dt_bias, norm, conv_state, state, *rest):
        return v.new_empty((*v.shape[:2], v.shape[2] * v.shape[3], v.shape[4]))

    operator = torch.library.custom_op(f"hf_gdn::{op}_", run, mutates_args=("conv_state", "state"), schema=_STEP_SCHEMA)
    operator.register_fake(fake)
    return operator


STEP_OPERATORS = {op: _define_step(op) for op in ("step_gdn", "step_kda")}


def call_step(
    kernel: registry.Kernel,
    projected: Projections,
    weights: Weights,
    spec: LayerSpec,
    conv_state: Tensor,
    state: Tensor,
    asked: str = "auto",
    slots: Slots | None = None,
) -> Tensor:
    """Call a step kernel: directly, or as an operator if torch.compile cannot trace it. With `slots`, directly."""
    heads = state.shape[1], state.shape[3]
    if slots is not None:
        given = projected, weights, spec, conv_state, state, slots
        return run_or_fall_back(kernel, asked, projected.q, heads, lambda kernel: in_slots.step(kernel, *given))
    if _as_operator(kernel):
        return STEP_OPERATORS[kernel.op](*projected[:6], *weights, conv_state, state, *spec, kernel.backend, asked)
    return run_or_fall_back(
        kernel,
        asked,
        projected.q,
        heads,
        lambda kernel: kernel.fn(projected, weights, spec, conv_state, state),
    )


_PROLOGUE_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor z, Tensor conv, Tensor? conv_bias, Tensor A_log, "
    "Tensor dt_bias, float? lower_bound, bool decay_in_dtype, float beta_scale, Tensor? conv_state, int keep, "
    "Tensor? cu_seqlens, Tensor? lengths, str backend, str asked) "
    "-> (Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor conv_state)"
)


def _define_prologue(op: str) -> Any:
    """Define the operator of a prologue op. The conv_state it returns is empty if `keep` is 0."""

    def run(q, k, v, a, b, z, conv, conv_bias, A_log, dt_bias, *rest):
        *spec, conv_state, keep, cu_seqlens, lengths, backend, asked = rest
        projected, weights = Projections(q, k, v, a, b, z), Weights(conv, conv_bias, A_log, dt_bias, None)
        options = dict(conv_state=conv_state, keep=keep, cu_seqlens=cu_seqlens, lengths=lengths, asked=asked)
        made = call_prologue(registry.get(op, backend), projected, weights, LayerSpec(*spec), **options)
        return *(x.contiguous() for x in made[:5]), q.new_empty(0) if made.conv_state is None else made.conv_state

    def fake(q, k, v, a, b, z, conv, *rest):
        heads, (*_, keep, _, _, _, _) = v.shape[2] * v.shape[3], rest
        dtype, channels = state_dtype(q.dtype), (q.shape[3],) if op.endswith("kda") else ()
        return (
            q.new_empty(q.shape),
            q.new_empty(q.shape),
            q.new_empty((*q.shape[:2], heads, v.shape[4])),
            q.new_empty((*q.shape[:2], heads, *channels), dtype=dtype),
            q.new_empty((*q.shape[:2], heads), dtype=dtype),
            q.new_empty((q.shape[0], conv.shape[0], keep) if keep else 0),
        )

    operator = torch.library.custom_op(f"hf_gdn::{op}", run, mutates_args=(), schema=_PROLOGUE_SCHEMA)
    operator.register_fake(fake)
    return operator


PROLOGUE_OPERATORS = {op: _define_prologue(op) for op in ("prologue_gdn", "prologue_kda")}
_differentiable_prologues = {
    op: prologue_with_backward(op, getattr(torch.ops.hf_gdn, op).default) for op in PROLOGUE_OPERATORS
}


def _through_operator(kernel: registry.Kernel) -> bool:
    """Whether gradients of a prologue or norm are an operator's; what can be compiled goes through autograd then."""
    return has_backward(kernel) and not (torch.compiler.is_compiling() and kernel.traceable)


def call_prologue(
    kernel: registry.Kernel,
    projected: Projections,
    weights: Weights,
    spec: LayerSpec,
    *,
    conv_state: Tensor | None,
    keep: int,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    asked: str = "auto",
    needs_grad: bool = False,
    slots: Slots | None = None,
) -> DeltaRuleInputs:
    """Call a prologue kernel: directly, or as an operator if torch.compile cannot trace it or gradients are needed.

    Where gradients are needed and a `conv_state` is continued, autograd goes through the eager kernel. With `slots`,
    directly.
    """
    known = spec.activation == "silu" and projected.a is not None
    if needs_grad and known and conv_state is None and _through_operator(kernel):
        call = _differentiable_prologues[kernel.op]
        return call(projected, weights, spec, keep, cu_seqlens, lengths, kernel.backend, asked)
    if needs_grad and not kernel.differentiable:
        kernel = registry.get_or_none(kernel.op, "eager") or kernel
    if slots is None and _as_operator(kernel):
        q, k, v, g, beta, recent = PROLOGUE_OPERATORS[kernel.op](
            *projected[:6], *weights[:4], *spec[:3], conv_state, keep, cu_seqlens, lengths, kernel.backend, asked
        )
        return DeltaRuleInputs(q, k, v, g, beta, recent if keep else None)
    options: dict[str, Any] = dict(conv_state=conv_state, keep=keep, cu_seqlens=cu_seqlens, lengths=lengths)
    if slots is not None:
        options["slots"] = slots
    heads = projected.v.shape[2] * projected.v.shape[3], projected.v.shape[4]
    return run_or_fall_back(
        kernel, asked, projected.q, heads, lambda kernel: kernel.fn(projected, weights, spec, **options)
    )


def _gated_norm(
    o: Tensor, z: Tensor, weight: Tensor, gate: str, norm_in_fp32: bool, eps: float, backend: str, asked: str
) -> Tensor:
    spec = LayerSpec(gate=gate, norm_in_fp32=norm_in_fp32, eps=eps)
    return call_norm(registry.get("gated_norm", backend), o, z, weight, spec, asked)


NORM_OPERATOR = torch.library.custom_op("hf_gdn::gated_norm", _gated_norm, mutates_args=())
NORM_OPERATOR.register_fake(lambda o, *_: torch.empty_like(o))
_differentiable_norm = norm_with_backward(torch.ops.hf_gdn.gated_norm.default)


def call_norm(
    kernel: registry.Kernel,
    o: Tensor,
    z: Tensor,
    weight: Tensor,
    spec: LayerSpec,
    asked: str = "auto",
    needs_grad: bool = False,
) -> Tensor:
    """Call a gated-norm kernel: directly, or as an operator where torch.compile or autograd cannot go through it."""
    if needs_grad and isinstance(spec.gate, str) and _through_operator(kernel):
        return _differentiable_norm(o, z, weight, *spec[4:], kernel.backend, asked)
    if _as_operator(kernel):
        return NORM_OPERATOR(o, z, weight, *spec[4:], kernel.backend, asked)
    return run_or_fall_back(kernel, asked, o, o.shape[2:], lambda kernel: kernel.fn(o, z, weight, spec))
