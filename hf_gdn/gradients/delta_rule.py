"""The chunk ops in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..dispatch import check_bounds, dims_of, run_or_fall_back
from ..kernels.contract import saved_rows, state_dtype
from ..registry import Kernel
from .common import backward_kernel, define, once

_INPUTS = "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
_OPTIONS = "Tensor? initial_state, Tensor? cu_seqlens, float scale, bool qk_l2norm, float beta_max, str backend"
_SAVE = f"{_INPUTS} {_OPTIONS}, int keep) -> (Tensor o, Tensor final_state, Tensor saved)"
_BACKWARD = (
    f"{_INPUTS} Tensor d_o, Tensor d_final_state, Tensor saved, {_OPTIONS}) -> "
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor initial_state)"
)


def _states(q: Tensor, v: Tensor, count: int) -> Tensor:
    """States ``[count, HV, K, V]``, not initialised."""
    return v.new_empty((count, v.shape[2], q.shape[3], v.shape[3]), dtype=state_dtype(v.dtype))


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _define(op: str, backward_op: str) -> tuple[Any, Any, Any]:
    """Define the operators of an op's forward and gradients, and the autograd function that joins them."""

    def save(q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm, beta_max, backend, keep):
        if cu_seqlens is not None:
            check_bounds(cu_seqlens, q.shape[1])
        options = dict(scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, qk_l2norm=qk_l2norm)
        kernel = registry.resolve_cached(op, q.device.type, q.dtype, dims_of(q, v), backend, True, beta_max)

        def work(kernel: Kernel) -> tuple[Tensor, Tensor, Tensor]:
            if kernel.save is not None and kernel.keep == keep:
                return kernel.save(q, k, v, g, beta, **options)
            return *kernel.fn(q, k, v, g, beta, **options), _states(q, v, 0)

        return run_or_fall_back(kernel, backend, q, v.shape[2:], work, beta_max=beta_max, needs_grad=True)

    def fake_save(q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm, beta_max, backend, keep):
        rows = saved_rows(q.shape[0], q.shape[1], cu_seqlens is not None, keep)
        return v.new_empty(v.shape), _states(q, v, _sequences(q, cu_seqlens)), _states(q, v, rows)

    def backward(q, k, v, g, beta, d_o, d_final_state, saved, initial_state, cu_seqlens, *rest):
        scale, qk_l2norm, beta_max, backend = rest
        options = dict(scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, qk_l2norm=qk_l2norm)
        given = q, k, v, g, beta, d_o.contiguous(), d_final_state.contiguous()
        kernel, asked = backward_kernel(backward_op, q, dims_of(q, v), backend, backend, beta_max)

        def work(kernel: Kernel) -> Any:
            forward = registry.get(op, kernel.backend)
            usable = len(saved) == saved_rows(q.shape[0], q.shape[1], cu_seqlens is not None, forward.keep)
            return kernel.fn(*given, saved=saved if usable else None, **options)

        *found, d_state = run_or_fall_back(kernel, asked, q, v.shape[2:], work, beta_max=beta_max)
        return *found, q.new_empty(0) if d_state is None else d_state

    def fake_backward(q, k, v, g, beta, d_o, d_final_state, saved, initial_state, *rest):
        found = (x.new_empty(x.shape) for x in (q, k, v, g, beta))
        return *found, q.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)

    saving = define(f"{op}_save", save, _SAVE, fake_save)
    running = define(backward_op, backward, _BACKWARD, fake_backward)
    differentiated = once(op, running)

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
            return saving(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            *tensors, ctx.scale, ctx.qk_l2norm, ctx.beta_max, ctx.backend, _ = inputs
            ctx.save_for_backward(*tensors, output[2])
            ctx.mark_non_differentiable(output[2])

        @staticmethod
        def backward(ctx: Any, d_o: Tensor, d_final_state: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
            *inputs, initial_state, cu_seqlens, saved = ctx.saved_tensors
            given = *inputs, d_o, d_final_state, saved, initial_state, cu_seqlens
            *found, d_state = differentiated(*given, ctx.scale, ctx.qk_l2norm, ctx.beta_max, ctx.backend)
            return *found, None if initial_state is None else d_state, *[None] * 6

    return saving, running, Function


_DEFINED = {op: _define(op, backward) for op in ("chunk_gdn", "chunk_kda") if (backward := registry.backward_of(op))}
# By op: the operator of the forward, and that of the gradients.
TRAINING_OPERATORS = {op: defined[:2] for op, defined in _DEFINED.items()}


def has_backward(kernel: Kernel) -> bool:
    """Whether a kernel of the same backend computes the gradients, not autograd through this one."""
    op = registry.backward_of(kernel.op)
    return op is not None and registry.get_or_none(op, kernel.backend) is not None


def with_backward(kernel: Kernel) -> Callable[..., tuple[Tensor, Tensor]]:
    """A chunk kernel as a function that autograd can go through, with the arguments of its `fn`."""

    def fn(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        named = dict(initial_state=None, cu_seqlens=None, qk_l2norm=False) | options
        return call_with_backward(kernel, q, k, v, g, beta, beta_max=1.0, backend=kernel.backend, **named)

    return fn


def call_with_backward(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    beta_max: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Call a chunk kernel that has a backward. Returns ``(o, final_state)``.

    Args:
        kernel: what the registry resolves to for these inputs, `beta_max` and the `backend` that was asked for.
    """
    options = initial_state, cu_seqlens, scale, qk_l2norm, beta_max, backend, kernel.keep
    o, final_state, _ = _DEFINED[kernel.op][2].apply(q, k, v, g, beta, *options)
    return o, final_state
