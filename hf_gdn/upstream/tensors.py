"""Private names of torch that concern tensors: versions, subclasses, tracing, nested arguments, static addresses.

All exist in torch 2.7 to 2.14.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as active_modes
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

__all__ = [
    "is_wrapper",
    "tree_flatten",
    "tree_map",
    "tree_map_only",
    "version",
    "is_traced",
    "parts",
    "in_forward_mode",
    "in_transform",
    "mark_static_address",
    "free_cublas_workspaces",
    "abandon_pool",
    "compiler_error",
]


def version(tensor: Tensor) -> int:
    """How often a tensor has been modified in place; 0 for inference tensors, which do not count modifications."""
    return 0 if tensor.is_inference() else tensor._version


def parts(tensor: Any) -> list[Tensor]:
    """The inner tensors of a wrapper subclass such as a quantized weight; empty for a plain tensor."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return []
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def is_traced(x: Tensor) -> bool:
    """Whether operators on x are recorded (torch.jit.trace, make_fx), or run without values (FakeTensor).

    Neither sees what a kernel writes to an address.
    """
    if torch.jit.is_tracing() or isinstance(x, FakeTensor):
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        isinstance(mode, (ProxyTorchDispatchMode, FakeTensorMode)) for mode in active_modes()
    )


def in_forward_mode() -> bool:
    """Whether derivatives are taken in forward mode: `torch.func.jvp`, dual numbers."""
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether a `torch.func` transform runs, whose tensors have no memory of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def mark_static_address(tensor: Tensor) -> None:
    """Tell torch.compile that a tensor's address does not change, so that its CUDA graphs do not copy it."""
    torch._dynamo.mark_static_address(tensor)


def free_cublas_workspaces() -> None:
    """Free cuBLAS's workspaces. Those allocated during a capture belong to the memory pool of that graph."""
    torch._C._cuda_clearCublasWorkspaces()


def abandon_pool(device: int, pool: tuple[int, int]) -> None:
    """End the allocation to a graph's memory pool, and release the pool, after a capture that failed.

    Below torch 2.12 ``capture_end`` raises before it ends the allocation (pytorch issues 180395 and 190348), and the
    next ``torch.cuda.empty_cache()`` fails an internal assert. Later versions end it, and there is nothing to end.
    """
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        function = getattr(torch._C, name, None)
        if function is not None:
            with contextlib.suppress(RuntimeError):
                function(device, pool)


def compiler_error() -> type[Exception]:
    """The base class of the errors that torch.compile raises."""
    return torch._dynamo.exc.TorchDynamoException
