"""Input checks, and calls that go on with the next kernel where a launch fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from . import registry
from .once import read_once
from .upstream.tensors import in_forward_mode

T = TypeVar("T")


def shape_of(x: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in x.shape) + "]"


def _expect(name: str, x: Tensor, shape: tuple[int, ...], letters: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {letters} = [{', '.join(map(str, shape))}], got {shape_of(x)}")


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    per_channel: bool,
) -> None:
    """Raise ValueError if shapes, dtypes or devices do not match. Reads no tensor values, so causes no host sync."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, T, heads, dim], got {shape_of(x)}")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    batch, length, k_heads, k_dim = q.shape
    v_heads, v_dim = v.shape[2:]
    _expect("k", k, (batch, length, k_heads, k_dim), "[B, T, HK, K] like q")
    _expect("v", v, (batch, length, v_heads, v_dim), "[B, T, HV, V]")
    if k_heads == 0 or v_heads % k_heads:
        raise ValueError(f"v's heads must be a multiple of q's and k's, got HV = {v_heads} and HK = {k_heads}")
    if per_channel:
        _expect("g", g, (batch, length, v_heads, k_dim), "[B, T, HV, K] (one decay per channel)")
    else:
        _expect("g", g, (batch, length, v_heads), "[B, T, HV] (one decay per head)")
    _expect("beta", beta, (batch, length, v_heads), "[B, T, HV]")
    sequences = batch
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
            raise ValueError(
                "cu_seqlens must be int32 or int64 of shape [N + 1], N >= 1, "
                f"got {cu_seqlens.dtype} {shape_of(cu_seqlens)}"
            )
        if batch != 1:
            raise ValueError(f"with cu_seqlens the sequences are packed along T and B must be 1, got B = {batch}")
        sequences = len(cu_seqlens) - 1
    if initial_state is not None:
        _expect("initial_state", initial_state, (sequences, v_heads, k_dim, v_dim), "[N, HV, K, V]")
    named = dict(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, cu_seqlens=cu_seqlens)
    devices = {name: x.device for name, x in named.items() if x is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(
            "all tensors must be on one device, got " + ", ".join(f"{n} on {d}" for n, d in devices.items())
        )


@read_once
def check_bounds(cu_seqlens: Tensor, length: int) -> None:
    """Raise ValueError unless cu_seqlens rises from 0 to `length`."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
        shown = str(bounds if len(bounds) <= 16 else [*bounds[:8], "...", *bounds[-7:]])
        raise ValueError(f"cu_seqlens must start at 0, never fall, and end at T = {length}, got {shown}")


def check_copy(cu_seqlens: Tensor, copy: Tensor, length: int) -> Tensor:
    """`check_bounds` by a copy on the host, after which `cu_seqlens` is not read back from its device.

    Returns:
        cu_seqlens, or a clone that counts its modifications if it was made in inference mode.
    """
    if copy.shape != cu_seqlens.shape or copy.device.type != "cpu":
        raise ValueError(
            f"cu_seqlens_cpu must be a copy of cu_seqlens on the CPU, {shape_of(cu_seqlens)}, "
            f"got {shape_of(copy)} on {copy.device}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.equal(cu_seqlens.long(), copy.long()):
        raise ValueError(f"cu_seqlens_cpu must equal cu_seqlens, {cu_seqlens.tolist()}, got {copy.tolist()}")
    if cu_seqlens.is_inference():
        with torch.inference_mode(False):
            cu_seqlens = cu_seqlens.clone()
    check_bounds(cu_seqlens, length, copy=copy)
    return cu_seqlens


def refuse_forward_mode() -> None:
    """Raise RuntimeError in forward mode, in which tangents would be lost without a word."""
    if in_forward_mode():
        raise RuntimeError(
            "forward-mode derivatives (torch.func.jvp, jacfwd, hessian, dual numbers) are not supported by hf_gdn; "
            "take torch.func.grad, vjp or jacrev, or run transformers' layers in hf_gdn.unpatched()"
        )


def dims_of(q: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    return q.shape[2], v.shape[2], q.shape[3], v.shape[3]


def run_or_fall_back(
    kernel: registry.Kernel,
    asked: str,
    q: Tensor,
    value_heads: Sequence[int],
    call: Callable[[registry.Kernel], T],
    *,
    beta_max: float = 1.0,
    needs_grad: bool = False,
) -> T:
    """``call(kernel)``, or the same of the next kernel if this one cannot be launched.

    Kernels that update states in place raise such errors before they write.

    Args:
        kernel: the kernel.
        asked: the backend that the caller asked for; if it is a name, the error is raised.
        q: ``[B, T, HK, K]``.
        value_heads: HV and V.
        call: calls a kernel.
        beta_max, needs_grad: as in `registry.resolve_cached`, for the next kernel.
    """
    while kernel.checked:
        try:
            return call(kernel)
        except Exception as error:
            dims = q.shape[2], value_heads[0], q.shape[3], value_heads[1]
            request = registry.Request(kernel.op, q.device.type, q.dtype, *dims, beta_max)
            kernel = registry.after_failure(kernel, request, error, asked, q.device, needs_grad)
    return call(kernel)
