"""Helpers of all numba kernels: refusals, and launches of compiled functions.

Nothing here imports numba: `library` does, when a kernel is first asked whether it serves a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...registry import Request
from ...upstream import openmp
from . import library
from .arguments import CODES, padded

MAX_HEAD_DIM = 256
# Numbers that a call touches below which a second thread costs more than it saves, about 10 microseconds' work.
SMALL = 32768


def launch(
    name: str,
    dtype: torch.dtype,
    tasks: int,
    size: int,
    scratch: int,
    tensors: Sequence[Tensor | None],
    *numbers: float,
) -> None:
    """Run a compiled function on torch's threads, or on this one if there is little to do.

    Args:
        name: name of the function.
        dtype: of the arithmetic.
        tasks: number of tasks.
        size: how many numbers all tasks touch, to decide on threads.
        scratch: numbers of scratch memory that a thread needs.
        tensors, numbers: arguments, see `arguments.Layout`.
    """
    compiled = library.get(name, dtype)
    threads = 1 if size < SMALL else openmp.threads_for(tasks)
    scratch = padded(scratch)
    memory = torch.empty(threads * scratch, dtype=dtype, device="cpu")
    block = compiled.layout.block(tasks, memory.data_ptr(), scratch * dtype.itemsize, tensors, *numbers)
    openmp.run(compiled.function, compiled.address, block, threads)


def why_not(request: Request) -> str | None:
    """The reason why all numba kernels refuse a request, or None. The first request for a CPU compiles them."""
    if request.device_type != "cpu":
        return f"needs tensors on a CPU; these are on {request.device_type}"
    if request.dtype not in CODES:
        name = str(request.dtype).removeprefix("torch.")
        return f"serves float16, bfloat16, float32 and float64; the tensors are {name}"
    if max(request.head_k_dim, request.head_v_dim) > MAX_HEAD_DIM:
        return f"serves head dimensions up to {MAX_HEAD_DIM}; K is {request.head_k_dim} and V is {request.head_v_dim}"
    return library.why_not(request.dtype)
