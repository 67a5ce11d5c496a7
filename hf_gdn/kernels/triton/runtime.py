"""Helpers of all Triton kernels: the import of Triton, refusals, strides, and launch parameters."""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ...registry import Request
from ...upstream.triton_kernels import round_to_bf16

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Missing:
        """Stand-in for triton, so that kernel modules can be imported without it; `why_not` then refuses all calls."""

        def __getattr__(self, name):
            return self

        def __call__(self, fn=None, *args, **kwargs):
            return fn if callable(fn) else self

    triton = tl = _Missing()

# Triton reads this when it is imported, so it is read once here, too.
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
if INTERPRET:
    round_to_bf16()
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Launch parameters of one kernel. Kernels with tile sizes derive their own class.

    Args:
        measured_on: card and shapes for which these values were the fastest of those tried, or `NOT_MEASURED`.
        num_warps: warps per program.
    """

    measured_on: str
    num_warps: int


def on_device(x: torch.Tensor):
    """Context manager that makes x's device the current one for launches, if it is not."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. Triton's function takes thirty times as long on the host."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The smallest power of two that is at least x. As above."""
    return 1 << (x - 1).bit_length()


@functools.cache
def _stride_names(letters: str, tensors: tuple[str, ...]) -> list[str]:
    return [f"stride_{name}{letter}" for name in tensors for letter in letters]


def strides(letters: str = "bth", /, **tensors: torch.Tensor) -> dict[str, int]:
    """Stride arguments of a kernel: ``stride_xb, stride_xt, stride_xh`` for every tensor x ``[B, T, H, ...]``; with
    ``"bthr"`` also ``stride_xr``, of value heads ``[B, T, HK, R, ...]``.

    The first stride of a single row is 0. Its true value depends on T, and with it which kernel Triton compiles.
    """
    sizes = []
    for x in tensors.values():
        first, *others = x.stride()[: len(letters)]
        sizes += [first if x.shape[0] > 1 else 0, *others]
    return dict(zip(_stride_names(letters, tuple(tensors)), sizes))


@functools.cache
def missing_build_tool() -> str | None:
    """What Triton lacks to build its launchers, C modules that are compiled at a first launch; None if nothing."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(shutil.which(name) for name in compilers):
        return (
            f"needs a C compiler for Triton's launchers; {' or '.join(compilers)} is not on PATH (CC names another one)"
        )
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    headers = Path(sysconfig.get_paths(scheme)["include"])
    if not (headers / "Python.h").is_file():
        return (
            f"needs Python's headers for Triton's launchers (python3-dev or python3-devel); {headers} has no Python.h"
        )
    return None


def why_not(request: Request) -> str | None:
    """The reason why all Triton kernels refuse a request, or None."""
    if not HAS_TRITON:
        return "needs the triton package, which is not installed"
    if request.device_type != "cuda" and not INTERPRET:
        return f"needs a CUDA device; the tensors are on {request.device_type}"
    missing = None if INTERPRET else missing_build_tool()
    if missing is not None:
        return missing
    if request.dtype not in DTYPES:
        return f"serves float16, bfloat16 and float32; the tensors are {str(request.dtype).removeprefix('torch.')}"
    if max(request.head_k_dim, request.head_v_dim) > MAX_HEAD_DIM:
        return f"serves head dimensions up to {MAX_HEAD_DIM}; K is {request.head_k_dim} and V is {request.head_v_dim}"
    return None


def why_not_chunk(request: Request) -> str | None:
    """The reason why the Triton chunk kernels refuse a request, or None.

    A chunk's inverse grows like (beta - 1)^T where keys resemble each other. In 16 bits it then loses the result: for
    keys within 5 % of each other and beta = 2, o is off by a third. In fp32, compiled for NVIDIA cards, the scans keep
    4 to 5 KB of a thread's tiles in local memory, in every tile size tried.
    """
    sentence = why_not(request)
    if sentence is not None:
        return sentence
    if request.beta_max > 1 and request.dtype in (torch.float16, torch.bfloat16):
        return f"is inaccurate in 16 bits for beta up to {request.beta_max:g}, where keys resemble each other"
    if request.dtype == torch.float32 and request.device_type == "cuda" and torch.version.hip is None:
        return "serves prompts in fp32 on AMD cards only; on NVIDIA cards its fp32 kernels do not fit in registers"
    return None
