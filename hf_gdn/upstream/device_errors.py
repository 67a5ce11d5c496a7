"""What Triton, CUDA and ROCm raise where a kernel cannot run: which errors are of one launch, which of the device.

Names and texts are those of Triton 3.4 to 3.9 and torch 2.7 to 2.14.
"""

from __future__ import annotations

import functools
import subprocess

import torch

# Of messages of the driver, after which every later call on the device fails, too.
_STICKY = (
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "unspecified launch failure",
    "device-side assert",
    "hardware error",
    "memory access fault",
)
# Of PyTorch, CUDA, Triton and cuBLAS, where memory is short.
_TRANSIENT = ("out of memory", "can't allocate memory", "alloc_failed")


@functools.cache
def launch_failures() -> tuple[type[BaseException], ...]:
    """Errors of compiling or starting a Triton kernel. Nothing has run on the device when they are raised."""
    found: list[type[BaseException]] = [subprocess.CalledProcessError]  # of the C compiler, for a launcher
    try:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        found += [CompilationError, OutOfResources, PTXASError]
    except ImportError:
        pass
    return tuple(found)


def is_launch_failure(error: BaseException) -> bool:
    """Whether a kernel could not be compiled or started, and the device works as before."""
    if isinstance(error, launch_failures()):
        return True
    text = str(error)
    if not isinstance(error, RuntimeError) or names_sticky(text):
        return False
    return "Triton Error" in text or "Failed to find C compiler" in text or "PassManager" in text


def names_sticky(text: str) -> bool:
    """Whether a message is one of the driver's after which the device cannot be used."""
    return any(words in text.lower() for words in _STICKY)


def is_transient(error: BaseException) -> bool:
    """Whether an error is due to memory or disk space at the time, and says nothing about the kernel."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OSError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _TRANSIENT)


def is_sticky(error: BaseException, device: torch.device) -> bool:
    """Whether an error has left the device unusable for this process."""
    if device.type == "cpu":
        return False
    if names_sticky(str(error)):
        return True
    try:
        torch.accelerator.synchronize(device)
    except RuntimeError:
        return True
    return False
