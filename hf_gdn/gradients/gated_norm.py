"""The gated norm in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import run_or_fall_back
from ..kernels.contract import LayerSpec
from .common import backward_kernel, define, once

OP = "backward_gated_norm"
_SCHEMA = (
    "(Tensor o, Tensor z, Tensor weight, Tensor d_y, str gate, bool norm_in_fp32, float eps, str backend, str asked) "
    "-> (Tensor o, Tensor z, Tensor weight)"
)


def _backward(o, z, weight, d_y, gate, norm_in_fp32, eps, backend, asked):
    spec, (HV, V) = LayerSpec(gate=gate, norm_in_fp32=norm_in_fp32, eps=eps), o.shape[2:]
    kernel, asked = backward_kernel(OP, o, (HV, HV, V, V), backend, asked)
    d_y = d_y.contiguous()
    return tuple(run_or_fall_back(kernel, asked, o, o.shape[2:], lambda kernel: kernel.fn(o, z, weight, d_y, spec)))


def _fake(o, z, weight, *_):
    return tuple(x.new_empty(x.shape) for x in (o, z, weight))


BACKWARD_NORM_OPERATOR = define(OP, _backward, _SCHEMA, _fake)
_once = once("gated_norm", BACKWARD_NORM_OPERATOR)


def norm_with_backward(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator of the gated norm as a function that autograd can go through."""

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Tensor:
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs[:3])
            ctx.options = inputs[3:]

        @staticmethod
        def backward(ctx: Any, d_y: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
            return *_once(*ctx.saved_tensors, d_y, *ctx.options), *[None] * len(ctx.options)

    return Function.apply
