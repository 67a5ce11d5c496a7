"""Compiled functions that any number of threads can run at once on one block of arguments.

Threads take tasks until none is left. Which thread runs a task, and how many there are, changes no result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numba
import numpy
from numba import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, InTreeCacheLocator
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature
from numba.extending import intrinsic

from ..arguments import COMMON, Layout
from .lanes import take_ticket
from .memory import jit

_TASK, _THREAD = COMMON.index("next_task"), COMMON.index("next_thread")
_ARITHMETIC = "arithmetic"  # a field beyond the end of the block: only its type is used


@intrinsic
def _place(typingctx, block, i):
    """Address of the integer i of a block."""

    def codegen(context, builder, signature, args):
        base = builder.ptrtoint(args[0], context.get_value_type(types.int64))
        return builder.add(base, builder.mul(args[1], context.get_constant(types.int64, 8)))

    return types.int64(block, types.int64), codegen


@intrinsic
def arguments(typingctx, block):
    """The arguments in a block, by name."""
    record = block.dtype

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(record))

    return record(block), codegen


@intrinsic
def scratch_at(typingctx, block, address):
    """Pointer to scratch memory, of the numbers in which the block's function computes."""
    result = types.CPointer(block.dtype.fields[_ARITHMETIC].type)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[1], context.get_value_type(result))

    return result(block, types.int64), codegen


@jit
def scratch_of_thread(block):
    """A thread's own scratch memory. Its type is that of the arithmetic, fp32 or float64."""
    x = arguments(block)
    return scratch_at(block, x.scratch + take_ticket(_place(block, _THREAD)) * x.scratch_bytes)


@jit
def next_task(block):
    """The next task; those from `tasks` on do not exist."""
    return take_ticket(_place(block, _TASK))


def _cache_in(folder: str, on_miss: Callable[[], None]) -> type[FunctionCache]:
    """numba's cache, with its files in a folder whatever the path of the sources.

    `on_miss` is called before a function is compiled.
    """

    class Locator(InTreeCacheLocator):
        def get_cache_path(self) -> str:
            return folder

    class Implementation(CompileResultCacheImpl):
        _locator_classes: ClassVar = [Locator]

    class Cache(FunctionCache):
        _impl_class = Implementation

        def load_overload(self, sig, target_context):
            found = super().load_overload(sig, target_context)
            if found is None:
                on_miss()
            return found

    return Cache


def compile_entry(
    function: Callable[..., None], layout: Layout, dtype: str, folder: str, on_miss: Callable[[], None]
) -> Any:
    """Compile ``function(block)`` for fp32 or float64 arithmetic, or load it from numba's cache in a folder.

    Returns:
        numba's object, which must outlive its `address`: a ``void (*)(void *)``.
    """
    fields = [(name, "i8") for name in layout.integers] + [(name, "f8") for name in layout.floats]
    record = numba.from_dtype(numpy.dtype([*fields, (_ARITHMETIC, dtype)]))
    signature = types.void(types.CPointer(record))
    owner: Any = CFunc(function, normalize_signature(signature), locals={}, options={"error_model": "numpy"})
    owner._cache = _cache_in(folder, on_miss)(function)
    owner.compile()
    return owner
