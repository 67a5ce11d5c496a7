"""Capture a function as a CUDA graph and replay it."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..upstream.tensors import abandon_pool, free_cublas_workspaces

# PyTorch's warning under torch.cuda.set_sync_debug_mode("warn").
_SYNCHRONISES = "called a synchronizing CUDA operation"
_failed: list[torch.cuda.CUDAGraph] = []  # graphs of failed captures: their destructor expects a capture that ended


class NotCapturable(Exception):
    """A decode step cannot be captured; the text gives the reason."""


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of all captures on a device. It is shared because libraries allocate workspaces per stream."""
    return torch.cuda.Stream(device)


class CudaCapture:
    """A CUDA graph. Capturing executes nothing on the device.

    Attributes:
        outputs: outputs of the captured function; every replay writes to the same tensors.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self.device, self.graph = device, torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # a graph's memory pool cannot use blocks that the allocator has cached
            # torch.cuda.graph() is not used, because its stream stays current if a capture fails.
            with torch.cuda.stream(_stream(torch.cuda.current_device())):
                self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self.outputs = function()
                    self.graph.capture_end()
                except BaseException:
                    _failed.append(self.graph)
                    with contextlib.suppress(RuntimeError):  # the capture may have ended, or be invalid
                        self.graph.capture_end()
                    abandon_pool(torch.cuda.current_device(), pool)
                    raise
            free_cublas_workspaces()  # so that each graph has its own workspace, which is freed with it

    def replay(self) -> None:
        """Replay the graph on the current stream."""
        with torch.cuda.device(self.device):
            self.graph.replay()

    @staticmethod
    @contextlib.contextmanager
    def watch(device: torch.device) -> Iterator[list[str]]:
        """Collect the operations of a block that wait for the device, which a capture does not permit."""
        waits: list[str] = []
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.device(device), warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for warning in found:
            if _SYNCHRONISES in str(warning.message):
                waits.append(f"{warning.filename}:{warning.lineno}")
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    @staticmethod
    def room(device: torch.device) -> int:
        """Free bytes, including unused memory that the allocator has reserved."""
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


CAPTURES: dict[str, Any] = {"cuda": CudaCapture}  # by device type
