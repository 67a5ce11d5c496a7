"""torch's own pool of CPU threads: compiled functions run on it, so that there is no second pool beside it.

torch's CPU operators use an OpenMP library that comes with torch. ``GOMP_parallel`` is that library's function for "run
this on so many threads", with the same interface in GCC's libgomp and LLVM's libomp.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from typing import Any

import torch

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _openmp() -> Any:
    """``GOMP_parallel(function, argument, threads, flags)`` of torch's OpenMP library, or None if it has none."""
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # also looks in the libraries that torch needs
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


def threads_for(tasks: int) -> int:
    """How many threads to use for a number of tasks: all of torch's, or one.

    There is no number between: libgomp ends threads that a smaller team does not need. In a forked process OpenMP's
    threads do not exist, and libgomp would wait for them, so one thread serves.
    """
    return 1 if tasks < 2 or _forked else torch.get_num_threads()


def run(function: Any, address: int, argument: Any, threads: int) -> None:
    """Run a compiled ``void (*)(void *)`` on so many threads at once, and wait for all of them.

    Args:
        function, address: as a ctypes function, and where it is.
        argument: a ctypes array.
        threads: number of threads; with one, this thread runs it.
    """
    if threads == 1:
        function(argument)
        return
    parallel = _openmp()
    if parallel is not None:
        parallel(address, argument, threads, 0)
        return
    others = [threading.Thread(target=function, args=(argument,)) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    function(argument)
    for thread in others:
        thread.join()
