"""Helpers of all numba kernels: refusals, compiled functions, and their launches.

Compiled functions (`compiled`) are imported and compiled, or loaded from a cache on disk, when a kernel is first asked
whether it serves; until then numba is not imported.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...log import logger
from ...registry import Request
from ...upstream import openmp
from . import arguments
from .arguments import CODES, Layout

MAX_HEAD_DIM = 256
# Numbers of a state, or of activations, below which a second thread costs more than it saves.
SMALL = 32768

LAYOUTS = {
    "step": arguments.STEP,
    "recurrent": arguments.RECURRENT,
    "prologue": arguments.PROLOGUE,
    "gated_norm": arguments.GATED_NORM,
}


class Compiled(NamedTuple):
    """A compiled function. `owner` is numba's object, which keeps it in memory."""

    function: Any
    owner: Any


_compiled: dict[tuple[str, torch.dtype], Compiled] = {}
_lock = threading.RLock()


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def load(name, dtype):
    from .compiled.entry import compile_entry

    module = importlib.import_module(f".compiled.{name}", __package__)
    entry = compile_entry(getattr(module, name), LAYOUTS[name], str(dtype).removeprefix("torch."))
    return Compiled(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(entry.address), entry)


def launch(
    name: str, dtype: torch.dtype, tasks: int, size: int, scratch: int, tensors: Sequence[Tensor | None], *numbers
) -> None:
    """Run a compiled function.

    Args:
        name: name of its layout.
        dtype: of the arithmetic.
        tasks: number of tasks.
        size: numbers that all tasks touch.
        scratch: numbers of scratch memory that a thread needs.
        tensors, numbers: see `arguments.Layout`.
    """
    compiled = _compiled.get((name, dtype))
    if compiled is None:
        compiled = _compiled[name, dtype] = load(name, dtype)
    threads = 1 if size < SMALL else openmp.threads_for(tasks)
    scratch = arguments.padded(scratch)
    memory = torch.empty(threads * scratch, dtype=dtype)
    block = LAYOUTS[name].block(tasks, memory.data_ptr(), scratch * dtype.itemsize, tensors, *numbers)
    openmp.run(compiled.function, block, threads)


def why_not(request: Request) -> str | None:
    """The reason why all numba kernels refuse a request, or None."""
    if request.device_type != "cpu":
        return f"serves CPUs; the tensors are on {request.device_type}"
    if request.dtype not in CODES:
        return f"serves float16, bfloat16, float32 and float64; the tensors are {str(request.dtype).removeprefix('torch.')}"
    if max(request.head_k_dim, request.head_v_dim) > MAX_HEAD_DIM:
        return f"serves head dimensions up to {MAX_HEAD_DIM}; K is {request.head_k_dim} and V is {request.head_v_dim}"
    return None
