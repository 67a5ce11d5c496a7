"""Capturing a function as a CUDA graph, and replaying it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from ..upstream.tensors import free_cublas_workspaces


class NotCapturable(Exception):
    """A decode step cannot be captured; the text says why."""


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of all captures on a device: libraries keep workspaces by stream."""
    return torch.cuda.Stream(device)


class CudaCapture:
    """A CUDA graph. Recording executes nothing on the device.

    Attributes:
        outputs: what the recorded function returned; every replay writes to the same tensors.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self.device, self.graph = device, torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # a graph's memory is taken from what the allocator does not hold
            # Not torch.cuda.graph(): it leaves its stream the current one when a capture fails.
            with torch.cuda.stream(_stream(torch.cuda.current_device())):
                self.graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.outputs = function()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # the capture is invalid already
                        self.graph.capture_end()
                    raise
                self.graph.capture_end()
            free_cublas_workspaces()  # the graph's own is freed with it, and no other graph writes there

    def replay(self) -> None:
        """Run what was recorded, on the current stream."""
        with torch.cuda.device(self.device):
            self.graph.replay()

    @staticmethod
    def room(device: torch.device) -> int:
        """Bytes that are free, the allocator's own included."""
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


CAPTURES: dict[str, Any] = {"cuda": CudaCapture}  # by device type
