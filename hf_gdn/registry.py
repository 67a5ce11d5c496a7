"""Register kernels and choose the one that serves a call.

An `Op` is a mathematical function with an oracle. A `Kernel` is one implementation of an op, named by its backend.
`resolve` chooses a kernel for a `Request`. Built-in kernels and those of other packages (entry-point group
``hf_gdn.kernels``) are loaded at the first query; kernels registered earlier are added then.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from operator import index
from typing import Any

import torch

from .errors import BackendError
from .log import logger, warn_once

ENTRY_POINT_GROUP = "hf_gdn.kernels"
# The backend that "auto" stands for in this process; the environment is read once.
DEFAULT_BACKEND = os.environ.get("HF_GDN_BACKEND") or "auto"
# The order in which "auto" tries backends; import order does not matter. Other backends are appended unless registered
# with `before`.
_ORDER = ("triton", "fla", "numba", "eager")
_BUILTIN = "hf_gdn.kernels"  # has one folder per backend; all modules in these folders are imported

Dims = tuple[int, int, int, int]  # HK, HV, K and V


@dataclass(frozen=True)
class Request:
    """The properties of a call that decide whether a kernel can serve it.

    Args:
        op: name of the op, one of `ops()`.
        device_type: ``"cpu"``, ``"cuda"``, ...
        dtype: dtype of q, k and v.
        num_k_heads: HK, heads of q and k.
        num_v_heads: HV, heads of v, gates and state.
        head_k_dim: K.
        head_v_dim: V.
        beta_max: the largest beta that the caller's model can compute.
    """

    op: str
    device_type: str
    dtype: torch.dtype
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    beta_max: float = 1.0

    @property
    def dims(self) -> Dims:
        """HK, HV, K and V."""
        return self.num_k_heads, self.num_v_heads, self.head_k_dim, self.head_v_dim

    @property
    def sizes(self) -> dict[str, int]:
        """The same as arguments of an op's `make_inputs`."""
        return dict(zip(("HK", "HV", "K", "V"), self.dims))

    @classmethod
    def of(cls, op: str, q: torch.Tensor, v: torch.Tensor) -> Request:
        """Build the request for q ``[B, T, HK, K]`` and v ``[B, T, HV, V]``."""
        return cls(op, q.device.type, q.dtype, q.shape[2], v.shape[2], q.shape[3], v.shape[3])


@dataclass(frozen=True)
class Op:
    """A mathematical function that kernels implement.

    Args:
        name: its name in kernels and requests.
        reference: the oracle; it has the kernels' signature and accepts any float dtype.
        make_inputs: ``make_inputs(B=, T=, HK=, HV=, K=, V=, dtype=, device=, seed=, decay=)`` returns the keyword
            arguments of a call, for tests and benchmarks.
    """

    name: str
    reference: Callable[..., Any]
    make_inputs: Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    Args:
        op: name of the op it implements.
        backend: name by which users select it.
        fn: the function; it has the signature of the op (see `hf_gdn.kernels.contract`).
        why_not: returns None if the kernel serves the request, else a sentence with the reason.
        differentiable: whether autograd can go through `fn`. Calls that need gradients take kernels for which it can,
            or whose backend has a kernel for the op's gradients (`backward_of`).
        save: for chunk kernels, `fn` in calls that need gradients, if more is to be kept for them than the inputs: it
            also returns states of the sequence.
        keep: `save` keeps a state after so many tokens.
        traceable: whether `fn` is plain PyTorch that torch.compile may trace. If not, compiled code calls it as an
            opaque operator.
        checked: whether the results of `fn` are compared with the oracle before the first use, once for every model of
            device (`hf_gdn.verification`): for kernels that a compiler makes for the device.
        max_tokens: for recurrent kernels, the largest number of tokens for which it is preferred to the chunk kernel.
        slots: whether `fn` takes ``slots=``, states in a pool (`hf_gdn.kernels.contract`).
        fast_on: device types on which no other backend is expected to be faster: "auto" does not warn there.
    """

    op: str
    backend: str
    fn: Callable[..., Any]
    why_not: Callable[[Request], str | None]
    differentiable: bool = False
    save: Callable[..., Any] | None = None
    keep: int = 0
    traceable: bool = False
    checked: bool = False
    max_tokens: int = 16
    slots: bool = False
    fast_on: tuple[str, ...] = ()


_ops: dict[str, Op] = {}
_kernels: dict[str, list[Kernel]] = {}
_table: dict[tuple[str, str], Kernel] = {}  # by op and backend
generation = 0  # incremented when a kernel is added or removed; cached choices of an older generation are invalid
_chosen: dict[tuple, str | None] = {}  # cache of `resolve_cached` and `companion`: backend by request
_waiting: list[tuple[Kernel, str | None]] = []  # registered before the built-in kernels were loaded
_loaded = False
_lock = threading.RLock()


def register_op(op: Op) -> Op:
    """Add an op. Raises ValueError if its name is taken."""
    if op.name in _ops:
        raise ValueError(f"op {op.name!r} is registered already; registered ops: {', '.join(_ops)}")
    _ops[op.name] = op
    _kernels[op.name] = []
    return op


def register(kernel: Kernel, *, before: str | None = None) -> Kernel:
    """Add a kernel to its op.

    Args:
        kernel: the kernel.
        before: name of the backend that "auto" tries right after this one; by default the kernel is tried last.

    Raises:
        ValueError: the op is unknown, already has a kernel of that backend, or has none of backend `before`. Kernels
            registered before the first query of the registry are checked at that query.
    """
    if _loaded:
        _add(kernel, before)
    else:
        _waiting.append((kernel, before))
    return kernel


def _add(kernel: Kernel, before: str | None) -> None:
    if kernel.op not in _ops:
        raise ValueError(f"kernel {kernel.backend!r} is for op {kernel.op!r}; registered ops: {', '.join(_ops)}")
    row = _kernels[kernel.op]
    backends = [other.backend for other in row]
    if kernel.backend in backends:
        raise ValueError(
            f"op {kernel.op!r} has a kernel of backend {kernel.backend!r} already; it has: {', '.join(backends)}"
        )
    if before is not None and before not in backends:
        raise ValueError(
            f"before={before!r}: op {kernel.op!r} has no such backend; it has: {', '.join(backends) or 'none'}"
        )
    if before is None and kernel.backend in _ORDER:
        before = next((b for b in _ORDER[_ORDER.index(kernel.backend) + 1 :] if b in backends), None)
    row.insert(len(row) if before is None else backends.index(before), kernel)
    _table[kernel.op, kernel.backend] = kernel
    forget_choices()


def forget_choices() -> None:
    """Forget which kernels were chosen, here and in layers: kernels have changed, or what is known of them."""
    global generation
    generation += 1
    _chosen.clear()


def unregister(op: str, backend: str) -> None:
    """Remove a kernel. Raises ValueError if it does not exist."""
    _kernels[op].remove(get(op, backend))
    del _table[op, backend]
    forget_choices()


def _submodules(package: str) -> list[pkgutil.ModuleInfo]:
    return list(pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."))


def _load() -> None:
    """Load the built-in kernels, add the kernels in `_waiting`, then load plug-ins."""
    global _loaded
    with _lock:
        if _loaded:
            return
        _loaded = True  # set first, because a plug-in may query the registry while it is loaded
        try:
            for folder in _submodules(_BUILTIN):
                if folder.ispkg:
                    for module in _submodules(folder.name):
                        importlib.import_module(module.name)
            # Kernels with `before` are added last, so that the backend they name exists.
            _waiting.sort(key=lambda row: (row[0].backend not in _ORDER, row[1] is not None))
            while _waiting:
                _add(*_waiting[0])
                del _waiting[0]
            for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP):
                target = entry_point.load()
                if callable(target):
                    target()
        except BaseException:
            _loaded = False
            raise


def ops() -> dict[str, Op]:
    """All ops by name."""
    _load()
    return dict(_ops)


def kernels(op: str | None = None) -> list[Kernel]:
    """All kernels, or those of one op, in the order in which "auto" tries them."""
    _load()
    if op is None:
        return [kernel for row in _kernels.values() for kernel in row]
    if op not in _ops:
        raise ValueError(f"unknown op {op!r}; registered ops: {', '.join(_ops)}")
    return list(_kernels[op])


def backends() -> list[str]:
    """Names of all registered backends."""
    return list(dict.fromkeys(kernel.backend for kernel in kernels()))


def check_backend(backend: str) -> str:
    """Return the backend's name. Raises ValueError if it is neither "auto" nor the backend of any kernel."""
    valid = ["auto", *backends()]
    if backend not in valid:
        raise ValueError(f"unknown backend {backend!r}; valid backends: {', '.join(valid)}")
    return backend


def get(op: str, backend: str) -> Kernel:
    """The kernel of that op and backend. Raises ValueError if there is none."""
    check_backend(backend)
    row = kernels(op)
    for kernel in row:
        if kernel.backend == backend:
            return kernel
    raise ValueError(f"op {op!r} has no kernel of backend {backend!r}; it has: {', '.join(k.backend for k in row)}")


def get_or_none(op: str, backend: str) -> Kernel | None:
    """The kernel of that op and backend, or None. For hot paths: it checks nothing and loads nothing."""
    return _table.get((op, backend))


def why_not(kernel: Kernel, request: Request) -> str | None:
    """Why a kernel does not serve a request: its own reason, or that its results were wrong on this device."""
    sentence = kernel.why_not(request)
    if sentence is None and (kernel.checked):
        from . import verification  # which needs the registry

        sentence = verification.why_not(kernel, request)
    return sentence


def backward_of(op: str) -> str | None:
    """The op that computes an op's gradients, None if there is none."""
    kind, _, variant = op.partition("_")
    if kind in ("prologue", "gated"):
        return f"backward_{op}"
    return f"backward_{variant}" if kind == "chunk" else None


_NO_BACKWARD = "has no backward"


def _why_no_gradients(kernel: Kernel, request: Request) -> str | None:
    """Why gradients of a request do not go through a kernel, or None; whether it serves the request is not asked."""
    op = backward_of(kernel.op)
    backward = None if op is None else get_or_none(op, kernel.backend)
    if backward is None:
        return None if kernel.differentiable else _NO_BACKWARD
    return why_not(backward, replace(request, op=backward.op))


def resolve(request: Request, backend: str = "auto", *, needs_grad: bool = False) -> Kernel:
    """Choose the kernel that serves a request.

    Args:
        request: the call to serve.
        backend: ``"auto"`` takes the first kernel that serves the request, in the order of `kernels`, and warns once
            if an earlier one refused, unless the device is one on which this kernel is fast. A named backend serves
            the request or raises an error.
        needs_grad: whether gradients are needed. ``"auto"`` then takes the first kernel that has a backward; for a
            named backend that has none, the eager kernel is returned.

    Raises:
        ValueError: unknown op or backend.
        BackendError: the named backend, or with "auto" every backend, refuses the request; the text gives the reason.
    """
    backend = DEFAULT_BACKEND if backend == "auto" else backend
    if backend == "auto":
        refusals = []
        for kernel in kernels(request.op):
            sentence = _why_no_gradients(kernel, request) if needs_grad else None
            if sentence == _NO_BACKWARD:
                logger.info("%s: %s has no backward, gradients go through another backend", kernel.op, kernel.backend)
                continue
            sentence = sentence or why_not(kernel, request)
            if sentence is None:
                break
            refusals.append(f"{kernel.backend} {sentence}")
        else:
            if needs_grad:  # of an op that has no backward on any backend
                return get(request.op, "eager")
            raise BackendError(f"no backend serves {request.op}: " + "; ".join(refusals))
        fast = request.device_type in kernel.fast_on or (needs_grad and request.device_type == "cpu")
        if refusals and not fast:
            warn_once(f"hf_gdn runs on the {kernel.backend} backend: {'; '.join(refusals)}")
    else:
        kernel = get(request.op, backend)
        sentence = why_not(kernel, request)
        if sentence is not None:
            raise BackendError(f"backend {backend!r} cannot serve {request.op}: {sentence}")
    sentence = _why_no_gradients(kernel, request) if needs_grad else None
    if sentence is not None:
        logger.info("%s with gradients runs on the eager backend: %s %s", request.op, kernel.backend, sentence)
        return get(request.op, "eager")
    return kernel


def _numbers(dims: Dims) -> Dims:
    """The same, where torch.compile traces symbols: what it compiles then holds for these dimensions."""
    return index(dims[0]), index(dims[1]), index(dims[2]), index(dims[3])


@torch.compiler.assume_constant_result
def _resolved_backend(
    op: str, device_type: str, dtype: torch.dtype, dims: Dims, beta_max: float, backend: str, needs_grad: bool
) -> str:
    key = (op, device_type, dtype, dims, beta_max, backend, needs_grad)
    chosen = _chosen.get(key)
    if chosen is None:
        kernel = resolve(Request(op, device_type, dtype, *dims, beta_max), backend, needs_grad=needs_grad)
        chosen = _chosen[key] = kernel.backend
    return chosen


def resolve_cached(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    dims: Dims,
    backend: str,
    needs_grad: bool = False,
    beta_max: float = 1.0,
) -> Kernel:
    """Cached `resolve` for hot paths and traced functions. `dims` are HK, HV, K and V."""
    beta_max = next((x for x in (1.0, 2.0) if beta_max == x), beta_max)  # a number, as in `_numbers`
    return _table[op, _resolved_backend(op, device_type, dtype, _numbers(dims), beta_max, backend, needs_grad)]


def chosen() -> set[tuple[str, str]]:
    """The ops that calls asked for so far, each with the name of the backend that serves it."""
    return {(key[0], backend) for key, backend in _chosen.items() if backend is not None}


def after_failure(
    kernel: Kernel, request: Request, error: Exception, backend: str, device: torch.device, needs_grad: bool = False
) -> Kernel:
    """The kernel that serves a call whose launch has failed; the failed one is refused for such calls from now on.

    Args:
        kernel, request: the kernel and the call.
        error: what it raised. It is raised again unless nothing has run on the device and the device still works.
        backend: the backend that was asked for.
        device: of the call.
        needs_grad: whether gradients are needed.

    Raises:
        BackendError: the backend was asked for by name.
    """
    from . import verification
    from .upstream.device_errors import is_launch_failure, names_sticky

    if kernel.checked and isinstance(error, RuntimeError) and names_sticky(str(error)):
        verification.device_lost(kernel, request, device, error)
    if not kernel.checked or not is_launch_failure(error):
        raise error
    verification.refuse(kernel, request, error)
    forget_choices()
    backend = DEFAULT_BACKEND if backend == "auto" else backend
    if backend != "auto":
        raise BackendError(f"backend {backend!r} cannot serve {kernel.op}: {why_not(kernel, request)}") from error
    return resolve(request, needs_grad=needs_grad)


@torch.compiler.assume_constant_result
def _companion_backend(
    op: str, device_type: str, dtype: torch.dtype, dims: Dims, backend: str, needs_grad: bool
) -> str | None:
    key = (op, device_type, dtype, dims, None, backend, needs_grad)
    if key not in _chosen:
        kernel, request = get_or_none(op, backend), Request(op, device_type, dtype, *dims)
        sentence = None
        if kernel is not None:
            sentence = (_why_no_gradients(kernel, request) if needs_grad else None) or why_not(kernel, request)
            if sentence not in (None, _NO_BACKWARD):
                warn_once(f"hf_gdn runs {op} on the eager backend: {backend} {sentence}")
        _chosen[key] = None if kernel is None or sentence is not None else backend
    return _chosen[key]


def companion(
    op: str, device_type: str, dtype: torch.dtype, dims: Dims, backend: str, needs_grad: bool = False
) -> Kernel | None:
    """Cached: the kernel of `op` on the backend that serves a layer's delta rule; None if it has none that serves.

    With `needs_grad`, None if gradients do not go through it either.
    """
    found = _companion_backend(op, device_type, dtype, _numbers(dims), backend, needs_grad)
    return None if found is None else _table[op, found]
