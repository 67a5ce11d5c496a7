"""Capture a function as a CUDA graph and replay it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from ..upstream.tensors import free_cublas_workspaces


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
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # a graph's memory pool cannot use blocks that the allocator has cached
            # torch.cuda.graph() is not used, because its stream stays current if a capture fails.
            with torch.cuda.stream(_stream(torch.cuda.current_device())):
                self.graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.outputs = function()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # the capture is already invalid
                        self.graph.capture_end()
                    raise
                self.graph.capture_end()
            free_cublas_workspaces()  # so that each graph has its own workspace, which is freed with it

    def replay(self) -> None:
        """Replay the graph on the current stream."""
        with torch.cuda.device(self.device):
            self.graph.replay()

    @staticmethod
    def room(device: torch.device) -> int:
        """Free bytes, including unused memory that the allocator has reserved."""
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


CAPTURES: dict[str, Any] = {"cuda": CudaCapture}  # by device type
