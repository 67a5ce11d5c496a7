"""Helpers of the flash-linear-attention adapters: calls and refusals.

Its functions have the same contract as our kernels, except for argument names.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

from torch import Tensor

from ...registry import Request


def adapt(module: str, name: str, recurrent: bool = False) -> Callable[..., tuple[Tensor, Tensor]]:
    """Wrap fla's function ``module.name`` as a kernel; the module is imported at the first call."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        scale: float,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        qk_l2norm: bool = False,
        **recurrent_only,
    ):
        function = getattr(importlib.import_module(module), name)
        o, state = function(
            q=q.contiguous(),
            k=k.contiguous(),
            v=v.contiguous(),
            g=g.contiguous(),
            beta=beta.contiguous(),
            scale=scale,
            initial_state=initial_state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=qk_l2norm,
            cu_seqlens=cu_seqlens,
        )
        if recurrent and recurrent_only.get("token_states") is not None:
            raise ValueError(
                "backend 'fla' does not return the state after every token; use backend 'triton' or 'eager'"
            )
        if recurrent and recurrent_only.get("inplace"):
            state = initial_state.copy_(state)  # type: ignore[union-attr]
        return o, state

    return call


def why_not(request: Request) -> str | None:
    if request.device_type != "cuda":
        return f"needs a CUDA device; the tensors are on {request.device_type}"
    if importlib.util.find_spec("fla") is None:
        return "needs the fla package, which is not installed: pip install hf-gdn[fla]"
    if request.dtype.itemsize > 4:
        return f"serves float16, bfloat16 and float32; the tensors are {str(request.dtype).removeprefix('torch.')}"
    if request.head_k_dim > 256:
        return f"serves K up to 256; K is {request.head_k_dim}"
    return None


def why_not_chunk(request: Request) -> str | None:
    """The reason why fla's chunk kernels refuse a request, or None. See `why_not_chunk` of our Triton kernels."""
    sentence = why_not(request)
    if sentence is None and request.beta_max > 1 and request.dtype.itemsize == 2:
        return f"is not checked in 16 bits for beta up to {request.beta_max:g}, where keys resemble each other"
    return sentence
