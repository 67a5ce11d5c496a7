"""What the ops in training share: operators, the kernel for gradients, and the refusal of second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import registry
from ..registry import Dims, Kernel


def define(name: str, function: Callable[..., Any], schema: str, fake: Callable[..., Any]) -> Any:
    """Define the operator ``hf_gdn::name``, which updates nothing in place, and return it."""
    torch.library.custom_op(f"hf_gdn::{name}", function, mutates_args=(), schema=schema).register_fake(fake)
    return getattr(torch.ops.hf_gdn, name).default


def once(op: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator for gradients of `op`, as a function that refuses to be differentiated again."""

    # Rather than the autograd that operators can register, which `torch.func` does not take.
    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Tensor) -> NoReturn:
            raise RuntimeError(
                f"{op} of hf_gdn has first derivatives only, and a second one was asked for: create_graph=True, or "
                "the gradient of a gradient"
            )

    def call(*inputs: Any) -> Any:
        # Dynamo cannot trace a function inside of another one's backward.
        return operator(*inputs) if torch.compiler.is_compiling() else Once.apply(*inputs)

    return call


def backward_kernel(
    op: str, x: Tensor, dims: Dims, backend: str, asked: str, beta_max: float = 1.0
) -> tuple[Kernel, str]:
    """The kernel for gradients of inputs like x: that of `backend`, else eager's, which computed the forward too.

    Returns:
        The kernel, and the backend that is asked for where its launch fails.
    """
    backend = registry.DEFAULT_BACKEND if backend == "auto" else backend
    if backend != "auto":
        named = registry.get_or_none(op, backend)
        request = registry.Request(op, x.device.type, x.dtype, *dims, beta_max)
        if named is None or registry.why_not(named, request) is not None:
            backend = "eager"
    return registry.resolve_cached(op, x.device.type, x.dtype, dims, backend, beta_max=beta_max), asked
