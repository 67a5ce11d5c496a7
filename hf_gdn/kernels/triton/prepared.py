"""Launches without Triton's own binding of arguments.

Triton binds and specialises all arguments of a launch anew each time, which takes longer than a decode step's kernels
run. What it would find depends on shapes, strides, dtypes and alignment alone, so it is kept by these: `launch` does so
for any call, `prepare` for calls that repeat with the same layout, whose constant arguments it binds as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .runtime import INTERPRET

Launcher = Callable[..., None]

_HIP = torch.version.hip is not None
_MOST = 4096  # compiled kernels that are kept; one is a few hundred bytes beside what Triton keeps
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], **given: Any) -> None:
    """Launch a kernel, which is compiled at the first launch of its kind.

    Args:
        kernel: the Triton function.
        grid: numbers of programs.
        given: its arguments, all of them, and Triton's launch options.
    """
    if INTERPRET:
        kernel[grid](**given)
        return
    names, pointers, free = _parameters(kernel)
    values = list(map(given.pop, names))
    key: list[Any] = [*values, kernel, *given.items()]
    for place in pointers:
        if (x := values[place]) is not None:
            key[place] = (x.dtype, x.data_ptr() & 15, _HIP and _is_far(x))
            device = x.get_device()
    key.append(device)
    for place in free:
        key[place] >>= 31
    found = tuple(key)
    compiled = _compiled.get(found)
    if compiled is None:
        compiled = kernel.warmup(**dict(zip(names, values)), **given, grid=grid)
        if len(_compiled) >= _MOST:
            _compiled.clear()
        _compiled[found] = compiled
    compiled[(*grid, 1, 1)[:3]](*values)


@functools.cache
def _parameters(kernel: Any) -> tuple[list[str], list[int], list[int]]:
    """Names of a kernel's parameters; places of its pointers; and of numbers for whose values it is not specialised."""
    pointers = [place for place, name in enumerate(kernel.arg_names) if name.startswith("p_")]
    return kernel.arg_names, pointers, [place for place, x in enumerate(kernel.params) if x.do_not_specialize]


def _is_far(x: Tensor) -> bool:
    """Whether offsets into a tensor's memory may not fit in 31 bits; kernels for AMD's cards differ then."""
    return x.untyped_storage().nbytes() >= 2**31


def layout_of(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What of tensors a compiled kernel depends on: strides, dtypes, addresses that 16 does not divide, and on AMD's
    cards which are large."""
    found: list[Any] = []
    offsets = 0
    for x in tensors:
        if x is None:
            found.append(None)
        else:
            found += (x.stride(), x.dtype)
            offsets |= x.data_ptr()
    if offsets & 15:
        found += [x is None or x.data_ptr() & 15 for x in tensors]
    if _HIP:
        found += [x is not None and _is_far(x) for x in tensors]
    return tuple(found)


def prepare(kernel: Any, grid: int, varying: tuple[str, ...], arguments: dict[str, Any], **options: Any) -> Launcher:
    """Compile a kernel for a launch and load it on the current device; nothing is launched.

    Args:
        kernel: the Triton function.
        grid: number of programs.
        varying: names of the arguments that are given to each launch, all tensors among them.
        arguments: all arguments by name, as in the first launch.
        options: Triton's launch options.

    Returns:
        A function that takes the values of `varying` and launches the kernel; the device has to be the current one.

    Raises:
        Errors of Triton and its compilers, if the kernel cannot be compiled or does not fit on the device.
    """
    if INTERPRET:
        constant = {name: x for name, x in arguments.items() if name not in varying} | options
        interpreted = kernel[(grid,)]
        return lambda *values: interpreted(**dict(zip(varying, values)), **constant)
    names = kernel.arg_names
    positions = [names.index(name) for name in varying]
    compiled = kernel.warmup(**arguments, **options, grid=(grid,))
    template = [None if name in varying else arguments[name] for name in names]
    run = compiled[(grid, 1, 1)]

    def run_with(*values: Any) -> None:
        called = template.copy()
        for position, value in zip(positions, values):
            called[position] = value
        run(*called)

    return run_with
