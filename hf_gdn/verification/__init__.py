"""Compiled kernels prove themselves on the device before they serve.

Compilers are known to make wrong code of kernels like these on some devices. So the first time that a compiled kernel
is chosen for a kind of call (op, dtype, heads and dimensions), it is run on small inputs and compared with the float64
oracle, on every model of device that the process sees. A kernel that is wrong, raises or does not compile is refused
for that kind of call, with a sentence that says why, and the next backend serves. Verdicts are kept on disk.

HF_GDN_VERIFY: ``1`` (the default) checks what has no verdict, ``always`` checks in every process, ``0`` never.

- `proofs`: the calls.
- `trial`: the comparison.
- `verdicts`: the files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from .. import registry
from ..environment import OFF, ON
from ..errors import BackendError, named, reason
from ..log import logger
from ..registry import Kernel, Request
from ..upstream.device_errors import is_sticky, is_transient
from . import verdicts
from .proofs import proof_in_slots
from .trial import Verdict, check

__all__ = ["why_not", "why_not_in_slots", "refuse", "unusable", "device_lost", "verdict_of", "forget", "MODES"]

MODES = ("0", "1", "always")
_BLOCKING = ("CUDA_LAUNCH_BLOCKING", "HIP_LAUNCH_BLOCKING")  # variables with which errors are raised by their launch

_known: dict[tuple[Any, ...], str | None] = {}  # by `_kind`: why a kernel is refused
_being_checked: set[tuple[Any, ...]] = set()  # by the thread that has the lock
_lock = threading.RLock()


def _mode() -> str:
    mode = os.environ.get("HF_GDN_VERIFY") or "1"
    mode = next((number for number, words in (("0", OFF), ("1", ON)) if mode.lower() in words), mode)
    if mode not in MODES:
        raise ValueError(f"HF_GDN_VERIFY must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def _kind(kernel: Kernel, request: Request) -> tuple[Any, ...]:
    return kernel.fn, request.device_type, request.dtype, request.dims


def why_not(kernel: Kernel, request: Request) -> str | None:
    """Why a compiled kernel must not serve a request on this machine; None if it has proven itself.

    Raises:
        ValueError: HF_GDN_VERIFY has another value than those of `MODES`.
        BackendError: the kernel was not checked before, and a CUDA graph is being captured.
        RuntimeError: the kernel has left the device unusable for this process.
    """
    kind, mode = _kind(kernel, request), _mode()
    if kind in _known or mode == "0":
        return _known.get(kind)
    return _found(kind, lambda: _refusal(kernel, request, mode))


def _found(kind: tuple[Any, ...], check: Callable[[], str | None]) -> str | None:
    """The refusal of a kind of call, by a check that other threads wait for; None inside of the check itself."""
    with _lock:
        if kind in _known or kind in _being_checked:
            return _known.get(kind)
        _being_checked.add(kind)
        try:
            refused = check()
        except Exception as error:
            if not is_transient(error):
                raise
            return f"could not be checked: {named(error)}"  # another choice checks again
        finally:
            _being_checked.remove(kind)
        _known[kind] = refused
        if refused is not None:
            registry.forget_choices()  # the check may have made some
        return refused


def why_not_in_slots(kernel: Kernel, request: Request, device: torch.device) -> str | None:
    """Why a compiled kernel must not serve a request with states in slots of a pool; None if it has proven itself.

    These are other compilations of it than those that `why_not` checks. The check is made once in a process.

    Raises:
        ValueError, RuntimeError: see `why_not`.
    """
    if not kernel.checked or not kernel.slots or _mode() == "0":
        return None

    def check() -> str | None:
        try:
            with torch.no_grad(), torch.device("cpu"):
                proof_in_slots(request).check(kernel, device)
        except AssertionError as error:
            return f"failed its check with states in slots: {reason(error)}"
        except Exception as error:
            if is_transient(error):
                raise
            if is_sticky(error, device):
                raise unusable(kernel, request, device, error) from error
            return f"failed its check with states in slots: raised {named(error)}"
        return None

    return _found((*_kind(kernel, request), "slots", str(device)), check)


def _refusal(kernel: Kernel, request: Request, mode: str) -> str | None:
    for device in _devices(request.device_type):
        refused = verdict_of(kernel, request, device, fresh=mode == "always").refused
        if refused is not None:
            return f"failed its check on {verdicts.model_of(device)}: {kernel.op}, {refused}"
    return None


def verdict_of(kernel: Kernel, request: Request, device: torch.device, fresh: bool = False) -> Verdict:
    """The verdict on a kernel on one device: the one on disk, else of a check now.

    Args:
        kernel, request: the kernel, and the kind of call.
        device: where.
        fresh: check even if there is a verdict.

    Raises:
        BackendError, RuntimeError: see `why_not`.
        OSError, MemoryError, torch.OutOfMemoryError: memory or disk space was short. Nothing is kept then.
    """
    kept = verdicts.key(kernel, request, device)
    verdict = None if fresh else verdicts.load(kept)
    if verdict is not None:
        return verdict
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise BackendError(
            f"{kernel.op} of backend {kernel.backend!r} was not checked on this device yet and a CUDA graph is being "
            "captured; run the same call once before the capture"
        )
    try:
        with torch.no_grad(), torch.device("cpu"):
            verdict = check(kernel, request, device)
    except Exception as error:
        if is_transient(error) or not is_sticky(error, device):
            raise
        raise unusable(kernel, request, device, error) from error
    logger.info("%s of backend %s checked in %.2f s: %s", kernel.op, kernel.backend, verdict.seconds, verdict)
    verdicts.save(kept, verdict)
    return verdict


def _refuse_later(kernel: Kernel, request: Request, device: torch.device, error: Exception) -> None:
    """Refuse a kernel that has left the device unusable, in later processes."""
    verdicts.save(verdicts.key(kernel, request, device), Verdict(f"left the device unusable: {reason(error)}"))


def unusable(kernel: Kernel, request: Request, device: torch.device, error: Exception) -> RuntimeError:
    """Refuse a kernel in later processes, because its check has left the device unusable; the error to raise."""
    _refuse_later(kernel, request, device, error)
    return RuntimeError(
        f"the check of {kernel.op} of backend {kernel.backend!r} left {verdicts.model_of(device)} unusable for "
        f"this process: {reason(error)}. Start again: the kernel is refused from now on"
    )


def device_lost(kernel: Kernel, request: Request, device: torch.device, error: Exception) -> None:
    """Log what to do after a launch raised an error of the device. With blocking launches, refuse the kernel.

    Otherwise such errors are raised by a later call, often of a kernel that is right.
    """
    if any(os.environ.get(name) == "1" for name in _BLOCKING):
        _refuse_later(kernel, request, device, error)
        hint = f"{kernel.op} of backend {kernel.backend!r} is refused for such calls from the next process on"
    else:
        hint = (
            f"It was raised at {kernel.op} of backend {kernel.backend!r}, but may come from any kernel before; with "
            f"{_BLOCKING[0]}=1 it is raised by the one that causes it, and `hf-gdn doctor` examines every kernel"
        )
    logger.error("%s: this process cannot use %s any more. %s", reason(error), device, hint)


def _devices(device_type: str) -> list[torch.device]:
    """A device of every model that the process sees, the current one first."""
    if device_type != "cuda":
        return [torch.device(device_type)]
    current = torch.cuda.current_device()
    found = {verdicts.model_of(torch.device("cuda", current)): torch.device("cuda", current)}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        found.setdefault(verdicts.model_of(device), device)
    return list(found.values())


def refuse(kernel: Kernel, request: Request, error: Exception) -> None:
    """Refuse a kernel for such calls in this process, because a launch failed after the check had passed."""
    with _lock:
        _known[_kind(kernel, request)] = f"could not be launched: {named(error)}"


def forget() -> None:
    """Forget all verdicts of this process; those on disk stay."""
    with _lock:
        _known.clear()
