"""Launches whose kernel is compiled, and whose constant arguments are bound, once.

Triton binds and specialises all arguments of a launch anew each time, which takes longer than a decode step's kernels
run. What it would find depends on shapes, strides, dtypes and alignment alone, so it is kept by these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .runtime import INTERPRET

Launcher = Callable[..., None]


def layout_of(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What of tensors a compiled kernel depends on: strides, dtypes, and addresses that 16 does not divide."""
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

    def launch(*values: Any) -> None:
        called = template.copy()
        for position, value in zip(positions, values):
            called[position] = value
        run(*called)

    return launch
