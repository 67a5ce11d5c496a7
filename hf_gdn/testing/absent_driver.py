"""Triton's launch path for a card that is not there: all of it is real but the driver, which launches nothing.

Kernels are compiled for the card, and their arguments bound and specialised as on a machine that has one. Tensors are
on the CPU, and results are not computed. For counting launches and compilations, and for host time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.driver import DriverBase

from ..kernels.triton import chunks, prepared, segmented_scan, step
from ..upstream.triton_kernels import jit_functions
from .compiled import SHARED_LIMIT, TARGETS


@dataclass
class Log:
    """What happened.

    Attributes:
        launches: names of kernels, in order.
        hashes: of the compiled kernels that were launched, in order.
        compilations: names of kernels and the seconds each took.
    """

    launches: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    compilations: list[tuple[str, float]] = field(default_factory=list)


def _driver(target: str, log: Log) -> Any:
    class Utils:
        def load_binary(self, name: str, kernel: Any, shared: int, device: int) -> tuple[int, ...]:
            return 1, 2, 0, 0, 1024

        def get_device_properties(self, device: int) -> dict[str, int]:
            return dict(max_shared_mem=SHARED_LIMIT[target], multiprocessor_count=132, warpSize=32)

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.name, self.hash = metadata.name, metadata.hash

        def __call__(self, *args: Any) -> None:
            log.launches.append(self.name)
            log.hashes.append(self.hash)

    class Driver(DriverBase):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = Utils(), Launcher

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return TARGETS[target]

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def map_python_to_cpp_type(self, name: str) -> str:
            return "int"

        def get_benchmarker(self) -> None:
            return None

    return Driver()


@contextmanager
def absent_card(target: str) -> Iterator[Log]:
    """Make Triton launch on a card of `hf_gdn.testing.compiled.TARGETS` that is not there.

    Kernels that were compiled before, for another driver, are not seen inside, and those of inside not afterwards.

    Examples:
        >>> from hf_gdn import registry
        >>> from hf_gdn.testing.absent_driver import absent_card
        >>> call = registry.ops()["gated_norm"].make_inputs(B=2, T=3, dtype=torch.bfloat16)
        >>> with absent_card("sm_90") as log:
        ...     _ = registry.get("gated_norm", "triton").fn(**call)
        >>> log.launches
        ['_gated_norm_kernel']
    """
    log, compile_, runtime = Log(), triton.compiler.compile, triton.runtime.driver

    @functools.wraps(compile_)
    def timed(source: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        made = compile_(source, *args, **kwargs)
        log.compilations.append((source.fn.__name__, time.perf_counter() - start))
        return made

    with ExitStack() as stack:
        stack.callback(runtime.set_active, None)  # the machine's own, when it is needed next
        runtime.set_active(_driver(target, log))
        for module in (chunks, segmented_scan):
            stack.enter_context(mock.patch.object(module, "shared_memory", lambda device: SHARED_LIMIT[target]))
        stack.enter_context(mock.patch.object(triton.compiler, "compile", timed))
        for kept in (step._launchers, prepared._compiled):
            stack.enter_context(mock.patch.dict(kept, clear=True))
        for kernel in jit_functions():
            caches = kernel.device_caches
            stack.callback(setattr, kernel, "device_caches", caches)
            kernel.device_caches = type(caches)(caches.default_factory)
        yield log
