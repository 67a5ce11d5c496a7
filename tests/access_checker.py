"""Watches every memory access of Triton's interpreter and reports what a GPU would punish.

The interpreter runs one program after the other, so races between programs, and between the threads of one program,
give right results in it. Per launch, these are findings:

    outside     an address that lies in no tensor of the launch
    conflict    two programs access the same element and at least one writes it, atomics among themselves aside
    reread      a program loads what it stored before, without a barrier in between
    overwrite   a program stores where it loaded before through other pointers, without a barrier in between: another
                thread may not have loaded yet
    alias       two tensors of the launch overlap and differ in element size, so that elements cannot be compared

`install` patches the interpreter for the process; `AccessChecker.findings` then fills up.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np

LOAD, STORE, ATOMIC = "load", "store", "atomic"


class Launch:
    """All accesses of one launch.

    Args:
        kernel: its name.
        tensors: first and last byte (exclusive) and element size of every tensor among the arguments.
    """

    def __init__(self, kernel: str, tensors: list[tuple[int, int, int]]) -> None:
        self.kernel, self.findings = kernel, Counter[str]()
        tensors = sorted(set(tensors))
        self.begins, self.ends = (np.array([t[i] for t in tensors], np.int64) for i in (0, 1))
        # Extents of tensors may overlap (views that interleave): the furthest end up to here.
        self.reach = np.maximum.accumulate(self.ends) if tensors else self.ends
        for (_, end, size), (begin, _, other) in pairwise(tensors):
            if begin < end and size != other:
                self.findings["alias"] += 1
        self.program = -1  # until the first one is announced
        self.accesses: dict[str, list[tuple[int, np.ndarray]]] = {LOAD: [], STORE: [], ATOMIC: []}
        self.synchronise()

    def start_program(self) -> None:
        self.program += 1
        self.synchronise()

    def synchronise(self) -> None:
        """A barrier: what the program loaded and stored before is done for all its threads."""
        self.loaded: list[np.ndarray] = []
        self.stored: list[np.ndarray] = []

    def access(self, kind: str, pointers: Any, mask: Any, size: int) -> None:
        """Note an access to elements of `size` bytes at `pointers` where `mask` is true."""
        addresses = np.asarray(pointers).astype(np.int64).ravel()
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask, bool), np.shape(pointers)).ravel()]
        if not len(addresses):
            return
        place = np.searchsorted(self.begins, addresses, side="right") - 1
        if (place < 0).any() or (addresses + size > self.reach[place]).any():
            self.findings["outside"] += 1
        self.accesses[kind].append((self.program, addresses))
        if kind == LOAD:
            if any(_overlap(addresses, stored) for stored in self.stored):
                self.findings["reread"] += 1
            self.loaded.append(addresses)
        elif kind == STORE:
            for loaded in self.loaded:
                if not np.array_equal(loaded, addresses) and _overlap(addresses, loaded):
                    self.findings["overwrite"] += 1
            self.stored.append(addresses)

    def finish(self) -> None:
        """Look for conflicts between programs."""
        stores, stored_by = self._joined(STORE)
        atomics, changed_by = self._joined(ATOMIC)
        loads, loaded_by = self._joined(LOAD)
        if self.program == 0 or not (len(stores) or len(atomics)):
            return
        self._conflicts(stores, stored_by, stores, stored_by)
        self._conflicts(stores, stored_by, loads, loaded_by)
        self._conflicts(stores, stored_by, atomics, changed_by)
        self._conflicts(atomics, changed_by, loads, loaded_by)

    def _joined(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and programs of all accesses of a kind."""
        found = self.accesses[kind]
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        programs = np.concatenate([np.full(len(addresses), program) for program, addresses in found])
        return np.concatenate([addresses for _, addresses in found]), programs

    def _conflicts(self, left: np.ndarray, by: np.ndarray, right: np.ndarray, other: np.ndarray) -> None:
        """Count a finding where an address of both sides was accessed by different programs."""
        if not len(left) or not len(right):
            return
        order = np.argsort(left, kind="stable")
        left, by = left[order], by[order]
        first = np.flatnonzero(np.r_[True, left[1:] != left[:-1]])
        lowest, highest = np.minimum.reduceat(by, first), np.maximum.reduceat(by, first)
        unique = left[first]
        place = np.minimum(np.searchsorted(unique, right), len(unique) - 1)
        same = unique[place] == right
        if (same & ((lowest[place] != other) | (highest[place] != other))).any():
            self.findings["conflict"] += 1


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two sets of addresses share any; sets whose ranges are apart cost nothing."""
    low, high = max(a.min(), b.min()), min(a.max(), b.max())
    if low > high:
        return False
    a, b = a[(a >= low) & (a <= high)], b[(b >= low) & (b <= high)]
    return bool(len(a) and len(b)) and bool(np.isin(a, b).any())


class AccessChecker:
    """Patches Triton's interpreter.

    Attributes:
        findings: how often each kind of finding was met in each kernel, with the test that met it first.
    """

    def __init__(self) -> None:
        self.findings: dict[tuple[str, str], str] = {}
        self._launch: Launch | None = None

    def install(self) -> None:
        from triton.runtime import interpreter

        checker, builder = self, interpreter.InterpreterBuilder

        def size_of(pointers: Any) -> int:
            return interpreter._get_np_dtype(pointers.get_element_ty()).itemsize

        def wrap(name: str, note: Any) -> None:
            original = getattr(builder, name)

            def method(self: Any, *args: Any) -> Any:
                if checker._launch is not None:
                    note(checker._launch, *args)
                return original(self, *args)

            setattr(builder, name, method)

        # Unmasked loads and stores go through the masked ones.
        wrap("create_masked_load", lambda launch, p, mask, *_: launch.access(LOAD, p.data, mask.data, size_of(p)))
        wrap("create_masked_store", lambda launch, p, _, mask, *__: launch.access(STORE, p.data, mask.data, size_of(p)))
        wrap(
            "create_atomic_rmw",
            lambda launch, _, p, __, mask, *___: launch.access(ATOMIC, p.data, mask.data, size_of(p)),
        )
        wrap("create_atomic_cas", lambda launch, p, *_: launch.access(ATOMIC, p.data, None, size_of(p)))
        wrap("set_grid_idx", lambda launch, *_: launch.start_program())
        wrap("create_barrier", lambda launch, *_: launch.synchronise())

        call, on_host = interpreter.GridExecutor.__call__, interpreter.GridExecutor._init_args_hst

        def _init_args_hst(self: Any, args: Any, kwargs: Any) -> Any:
            found = on_host(self, args, kwargs)
            checker._begin(self.fn.__name__, [*found[0], *found[1].values()])
            return found

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return call(self, *args, **kwargs)
            finally:
                checker._end()

        interpreter.GridExecutor._init_args_hst = _init_args_hst
        interpreter.GridExecutor.__call__ = __call__

    def _begin(self, kernel: str, arguments: list[Any]) -> None:
        tensors = []
        for x in arguments:
            if hasattr(x, "untyped_storage") and x.numel():
                last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1
                tensors.append((x.data_ptr(), x.data_ptr() + last * x.element_size(), x.element_size()))
        self._launch = Launch(kernel, tensors)

    def _end(self) -> None:
        launch, self._launch = self._launch, None
        if launch is None:
            return
        launch.finish()
        for kind in launch.findings:
            self.findings.setdefault((launch.kernel, kind), os.environ.get("PYTEST_CURRENT_TEST", ""))
