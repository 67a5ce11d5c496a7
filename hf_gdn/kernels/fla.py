"""flash-linear-attention as a backend where it is installed, CUDA only; never imported when absent.

Its functions, in `fla.ops.gated_delta_rule` and `fla.ops.kda`, follow the same contract but for the arguments' names.
"""

from __future__ import annotations

import importlib
import importlib.util

from torch import Tensor

from ..registry import Kernel, Request, register


def _adapt(module: str, name: str, recurrent: bool):
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
            q=q.contiguous(), k=k.contiguous(), v=v.contiguous(), g=g.contiguous(), beta=beta.contiguous(),
            scale=scale, initial_state=initial_state, output_final_state=True,
            use_qk_l2norm_in_kernel=qk_l2norm, cu_seqlens=cu_seqlens,
        )  # fmt: skip
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


for _op, _module, _name in (
    ("chunk_gdn", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    ("recurrent_gdn", "fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    ("chunk_kda", "fla.ops.kda", "chunk_kda"),
    ("recurrent_kda", "fla.ops.kda", "fused_recurrent_kda"),
):
    register(
        Kernel(_op, "fla", _adapt(_module, _name, _op.startswith("recurrent")), why_not,
               differentiable=_op.startswith("chunk"))
    )  # fmt: skip
