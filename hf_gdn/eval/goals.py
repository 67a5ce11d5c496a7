"""The project's own goals, on an H200 in bf16 and on CPUs, shown beside what is measured. Milliseconds."""

from __future__ import annotations

import torch

from ..loading.shapes import LARGE
from .kernel_results import LayerRow

_QWEN, _KIMI = LARGE
# By op, shape, batch and tokens, in a CUDA graph.
_OPS = {
    **{("recurrent_gdn", _QWEN, B, 1): us / 1e3 for B, us in ((1, 3), (8, 11), (32, 38), (128, 136), (256, 268))},
    **{("step_gdn", _QWEN, B, 1): us / 1e3 for B, us in ((1, 8), (32, 48), (256, 300))},
    ("chunk_gdn", _QWEN, 1, 2048): 0.085,
    ("chunk_gdn", _QWEN, 1, 8192): 0.27,
    ("chunk_gdn", _QWEN, 1, 32768): 0.80,
    ("chunk_gdn", _QWEN, 8, 2048): 0.38,
    ("chunk_gdn", _QWEN, 16, 4096): 1.45,
    ("chunk_kda", _KIMI, 1, 2048): 0.14,
    ("chunk_kda", _KIMI, 1, 8192): 0.45,
    ("chunk_kda", _KIMI, 1, 32768): 1.5,
    ("chunk_kda", _KIMI, 8, 2048): 0.80,
}
# By phase, shape, batch, tokens, and whether in a CUDA graph.
_LAYERS = {
    ("decode", _QWEN, 1, 1, False): 0.15,
    ("decode", _QWEN, 1, 1, True): 0.03,
    ("decode", _QWEN, 32, 1, True): 0.075,
    ("decode", _KIMI, 1, 1, True): 0.04,
    ("decode", _KIMI, 32, 1, True): 0.085,
    ("prefill", _QWEN, 1, 512, False): 0.35,
    ("prefill", _QWEN, 8, 2048, False): 2.5,
    ("prefill", _KIMI, 8, 2048, False): 3.2,
}
# On a CPU: what a decode step may cost beside the projections, for every row of the batch, and how many times as fast
# as the original's a prompt is to be.
_BESIDE = {"float32": 0.6, "bfloat16": 0.8}
_PREFILL_SPEEDUP = {(_QWEN, 1, 512): 1.6, (_KIMI, 1, 512): 8.0}
# Of a new process's first prefill of 512 tokens and first token, with Triton's cache empty and filled.
FIRST_CALL = {"empty": 8000.0, "filled": 500.0}


def of_op(op: str, shape: str, batch: int, tokens: int, gpu_graph: bool, device: torch.device) -> float | None:
    """The goal for a call of an op, None where there is none."""
    return _OPS.get((op, shape, batch, tokens)) if gpu_graph and device.type == "cuda" else None


def of_layer(row: LayerRow, device: torch.device, *, original: float | None, projections: float | None) -> float | None:
    """The goal for a patched layer, None where there is none; on a CPU from what other sides took in the same run."""
    size = row.shape, row.batch, row.tokens
    if device.type == "cuda":
        return _LAYERS.get((row.phase, *size, row.gpu_graph))
    if row.phase == "decode" and row.shape in LARGE and row.dtype in _BESIDE and projections is not None:
        return projections + row.batch * _BESIDE[row.dtype]
    if row.phase == "prefill" and size in _PREFILL_SPEEDUP and original is not None:
        return original / _PREFILL_SPEEDUP[size]
    return None
