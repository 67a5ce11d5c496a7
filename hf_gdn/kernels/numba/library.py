"""The compiled functions of a process: compiled once per machine, then loaded from a cache on disk.

numba's own cache keeps them, in a folder whose name changes with the sources, the versions and the processor. All
functions of an arithmetic (fp32, or float64) are loaded together, so that a model waits once.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import os
import platform
import shutil
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...cache_folder import cache_folder, make_writable
from ...log import logger
from ..contract import state_dtype
from . import arguments
from .arguments import Layout

INSTALL = "pip install 'hf-gdn[cpu]'"
LAYOUTS = {
    "step": arguments.STEP,
    "recurrent": arguments.RECURRENT,
    "prologue": arguments.PROLOGUE,
    "gated_norm": arguments.GATED_NORM,
}


class Compiled(NamedTuple):
    """A compiled function.

    Attributes:
        layout: of the block of arguments.
        function, address: the function for ctypes, and where it is.
        owner: numba's object; the function exists as long as this does.
    """

    layout: Layout
    function: Any
    address: int
    owner: Any


_functions: dict[tuple[str, torch.dtype], Compiled] = {}
_verdicts: dict[torch.dtype, str | None] = {}  # by arithmetic: why it does not serve, or None
_lock = threading.RLock()

if hasattr(os, "register_at_fork"):  # a fork waits for a compilation: no thread of the child would release the lock
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def get(name: str, dtype: torch.dtype) -> Compiled:
    """A compiled function. `why_not` has loaded it."""
    found = _functions.get((name, dtype))
    if found is None:  # a kernel that is called directly, without the registry
        sentence = why_not(dtype)
        if sentence is not None:
            raise RuntimeError(f"backend 'numba' {sentence}")
        found = _functions[name, dtype]
    return found


def why_not(dtype: torch.dtype) -> str | None:
    """Why compiled functions do not serve tensors of `dtype`, or None. Compiles or loads them at the first call."""
    dtype = state_dtype(dtype)
    if dtype not in _verdicts:
        with _lock:
            if dtype not in _verdicts:
                _verdicts[dtype] = _load(dtype)
    return _verdicts[dtype]


def _load(dtype: torch.dtype) -> str | None:
    """Load all functions of an arithmetic. Returns a sentence if that fails."""
    if importlib.util.find_spec("numba") is None:
        return f"needs the numba package, which makes CPUs faster and is not installed: {INSTALL}"
    try:
        from .compiled import entry
    except Exception as error:  # numba refuses versions of NumPy and LLVM in many ways
        return f"needs a numba that can be imported; this one raises {_first_line(error)}"
    try:
        folder = cache_folder() / "numba" / _fingerprint()
        make_writable(folder)
    except OSError as error:
        return f"needs a folder for compiled functions; {_first_line(error)} (HF_GDN_CACHE names another folder)"
    name = str(dtype).removeprefix("torch.")
    misses, start = 0, time.perf_counter()

    def on_miss() -> None:
        nonlocal misses
        if misses == 0:
            logger.warning("compiling CPU kernels, once for this machine, up to half a minute; kept in %s", folder)
        misses += 1

    try:
        found = {}
        for function, layout in LAYOUTS.items():
            module = importlib.import_module(f".compiled.{function}", __package__)
            owner = entry.compile_entry(getattr(module, function), layout, name, str(folder), on_miss)
            address = owner.address
            found[function, dtype] = Compiled(layout, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address), address, owner)
    except Exception as error:  # of numba, LLVM or pickle, which may raise anything
        shutil.rmtree(folder, ignore_errors=True)  # the next process compiles again
        return f"needs functions that can be compiled and cached in {folder}; {_first_line(error)}"
    _functions.update(found)
    logger.info("CPU kernels %s in %.1f s", "compiled" if misses else "loaded", time.perf_counter() - start)
    return None


def _fingerprint() -> str:
    """A name for what the compiled functions depend on: sources, versions, processor."""
    import llvmlite.binding

    here = Path(__file__).parent
    sources = [here / "arguments.py", *sorted((here / "compiled").glob("*.py"))]
    parts = [metadata.version("numba"), metadata.version("llvmlite"), platform.python_version()]
    parts += [llvmlite.binding.get_host_cpu_name(), *(source.read_text("utf-8") for source in sources)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
