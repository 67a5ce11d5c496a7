"""Helpers of all eager kernels: refusals, and protection from autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...registry import Request


def why_not(request: Request) -> str | None:
    if not request.dtype.is_floating_point:
        return f"serves floating-point tensors; these are {str(request.dtype).removeprefix('torch.')}"
    return None


def without_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Run fn without autocast, which would round products with the state to 16 bits. Its first argument is or has q."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        device = (first if isinstance(first, Tensor) else first.q).device.type
        if not torch.is_autocast_enabled(device):
            return fn(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    return call
