"""CUDA-graph decoding for ``generate``; `decode_session` explains how it works.

`capture` wraps a CUDA graph. `model_state` and `cache_state` compare the state that a graph depends on. `captured_step`
stores the graphs of each model.
"""

from __future__ import annotations

from .capture import CAPTURES, CudaCapture, NotCapturable
from .captured_step import known_graphs, release
from .decode_session import DecodeSession, make_get_compiled_call
from .model_state import model_state

__all__ = [
    "CAPTURES",
    "CudaCapture",
    "DecodeSession",
    "NotCapturable",
    "known_graphs",
    "make_get_compiled_call",
    "model_state",
    "release",
]
