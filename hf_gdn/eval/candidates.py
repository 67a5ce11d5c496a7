"""Everything the kernels can be timed against: the registry's backends, and two that no model is patched with.

``transformers``  the torch function that a family's layer falls back to, called like ours.
``flash_qla``     FlashQLA's chunked GDN (QwenLM/FlashQLA), where it is installed; imported when first called.

Both are `hf_gdn.registry.Kernel` objects and keep the contract of `hf_gdn.kernels`, packed sequences aside.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..registry import Kernel, Request

# transformers' torch functions, the same names in every family's module.
FUNCTIONS = {
    "chunk_gdn": "torch_chunk_gated_delta_rule",
    "recurrent_gdn": "torch_recurrent_gated_delta_rule",
    "chunk_kda": "chunk_kimi_delta_attention",
    "recurrent_kda": "recurrent_kimi_delta_attention",
}
# Compute capabilities FlashQLA has kernels for; on the last it has no backward.
_FLASH_QLA = ((9, 0), (10, 0), (10, 3), (12, 0))


def candidates(op: str, model_type: str) -> list[Kernel]:
    """All that may serve `op` at the shapes of a model type: transformers, the registry's in order, FlashQLA.

    transformers has functions of the delta rule alone.
    """
    mine = [_transformers(op, model_type)] if op in FUNCTIONS else []
    mine += registry.kernels(op)
    return [*mine, _flash_qla()] if op == "chunk_gdn" else mine


def backends() -> list[str]:
    """Names of all backends, of any op."""
    return ["transformers", *registry.backends(), "flash_qla"]


@contextmanager
def on_its_own(backend: str) -> Iterator[None]:
    """Keep fla from handing its calls to FlashQLA, which it does where that is installed: they are two rows."""
    if backend != "fla":
        yield
        return
    before = os.environ.get("FLA_FLASH_QLA")
    os.environ["FLA_FLASH_QLA"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["FLA_FLASH_QLA"]
        else:
            os.environ["FLA_FLASH_QLA"] = before


# -------------------------------------------------------------------------------------------------------- transformers


@functools.cache
def torch_function(op: str, model_type: str) -> Callable[..., Any]:
    """transformers' torch function, also where its name is bound to another package's kernel or to a hub module."""
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    function = getattr(module, FUNCTIONS[op])
    if isinstance(function, torch.nn.Module):  # what the kernels package makes of it
        function = inspect.getclosurevars(type(function).forward).nonlocals["func"]
    return inspect.unwrap(function)


def _transformers(op: str, model_type: str) -> Kernel:
    def why_not(request: Request) -> str | None:
        if importlib.util.find_spec(f"transformers.models.{model_type}") is None:
            return f"needs model type {model_type!r}, which this version of transformers does not have"
        return None

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        scale: float,
        initial_state: Tensor | None = None,
        cu_seqlens: None = None,
        qk_l2norm: bool = False,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor]:
        function = torch_function(op, model_type)
        group = v.shape[2] // q.shape[2]
        if group > 1 and "repeat_interleave" not in function.__code__.co_names:  # older versions leave it to the layer
            q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
        # It scales by K^-1/2 itself.
        o, state = function(
            q,
            k,
            v,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=qk_l2norm,
        )
        # A decode step copies the state back, as the model's cache does.
        return o, (initial_state.copy_(state) if inplace and initial_state is not None else state)

    return Kernel(op, "transformers", call, why_not, differentiable=True)


# ------------------------------------------------------------------------------------------------------------ FlashQLA


def _flash_qla() -> Kernel:
    def why_not(request: Request) -> str | None:
        if importlib.util.find_spec("flash_qla") is None:
            return "needs the flash_qla package, which is not installed: pip install flash-qla"
        if request.device_type != "cuda":
            return f"needs a CUDA device; the tensors are on {request.device_type}"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"serves float16 and bfloat16; the tensors are {str(request.dtype).removeprefix('torch.')}"
        if (request.head_k_dim, request.head_v_dim) != (128, 128):
            return f"serves K = V = 128; K is {request.head_k_dim} and V is {request.head_v_dim}"
        if torch.cuda.get_device_capability() not in _FLASH_QLA:
            names = ", ".join(f"{major}.{minor}" for major, minor in _FLASH_QLA)
            major, minor = torch.cuda.get_device_capability()
            return f"serves compute capabilities {names}; this device has {major}.{minor}"
        return None

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        scale: float,
        initial_state: Tensor | None = None,
        cu_seqlens: None = None,
        qk_l2norm: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return importlib.import_module("flash_qla").chunk_gated_delta_rule(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            scale=scale,
            initial_state=initial_state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=qk_l2norm,
        )

    forward_only = torch.cuda.is_available() and torch.cuda.get_device_capability() == _FLASH_QLA[-1]
    return Kernel("chunk_gdn", "flash_qla", call, why_not, differentiable=not forward_only)
