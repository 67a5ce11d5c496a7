"""Every op on every backend that serves it, timed beside transformers' own function, no time without a right result.

Per row: median milliseconds, the ratio to transformers' torch function in the same run, the peak of extra memory, and
the relative error against the float64 oracle.
"""

from __future__ import annotations

import datetime
import importlib
import inspect
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from .. import registry
from ..errors import UserError
from ..registry import Request
from . import machine, models

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts the memory, is talkative


@dataclass(frozen=True)
class Case:
    """An op at a model's shape, and transformers' function for it."""

    op: str
    batch: int
    tokens: int
    k_heads: int
    v_heads: int
    module: str
    function: str


_QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"
_KIMI = "transformers.models.kimi_linear.modeling_kimi_linear"
CASES = (
    Case("chunk_gdn", 1, 512, 16, 32, _QWEN, "torch_chunk_gated_delta_rule"),
    Case("chunk_gdn", 1, 2048, 16, 32, _QWEN, "torch_chunk_gated_delta_rule"),
    Case("chunk_kda", 1, 128, 32, 32, _KIMI, "chunk_kimi_delta_attention"),
    Case("chunk_kda", 1, 512, 32, 32, _KIMI, "chunk_kimi_delta_attention"),
    Case("recurrent_gdn", 1, 1, 16, 32, _QWEN, "torch_recurrent_gated_delta_rule"),
    Case("recurrent_gdn", 4, 1, 16, 32, _QWEN, "torch_recurrent_gated_delta_rule"),
    Case("recurrent_kda", 1, 1, 32, 32, _KIMI, "recurrent_kimi_delta_attention"),
    Case("recurrent_kda", 4, 1, 32, 32, _KIMI, "recurrent_kimi_delta_attention"),
)
HEAD_DIM = 128
NAN = float("nan")
# Relative Frobenius error allowed: the operator's own bar per dtype, and 1e-5 in fp32 (2^-24 times some hundred terms).
ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Row:
    """One measurement."""

    op: str
    batch: int
    tokens: int
    backend: str
    ms: float
    speedup: float
    extra_mib: float
    memory_ratio: float
    error: float


def _transformers(case: Case) -> Callable[..., Any]:
    """transformers' torch function, called like ours; a decode step copies its state back, as the model does."""
    function = inspect.unwrap(getattr(importlib.import_module(case.module), case.function))

    def call(q, k, v, g, beta, *, scale, initial_state, cu_seqlens, qk_l2norm, inplace=False):
        o, state = function(
            q, k, v, g=g, beta=beta, initial_state=initial_state, output_final_state=True,
            use_qk_l2norm_in_kernel=qk_l2norm,
        )  # fmt: skip
        return o, (initial_state.copy_(state) if inplace else state)

    return call


def _seconds(run: Callable[[], Any], device: torch.device, budget: float = 1.0) -> float:
    """Median of as many runs as fit the budget, at least 3, after one warm-up."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    count = max(3, min(200, int(budget / max(once(), 1e-6))))
    return statistics.median(once() for _ in range(count))


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most memory that was allocated at once during a run, beyond what was before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    now = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _error(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    """Largest relative Frobenius error of output and state; infinite when anything is not finite."""
    if not all(torch.isfinite(x).all() for x in got):
        return float("inf")
    return max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(got, wanted))


@torch.inference_mode()
def measure(case: Case, device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> list[Row]:
    """Rows of one case; transformers' function comes first."""
    op = registry.ops()[case.op]
    inputs = op.make_inputs(
        B=case.batch,
        T=case.tokens,
        HK=case.k_heads,
        HV=case.v_heads,
        K=HEAD_DIM,
        V=HEAD_DIM,
        dtype=dtype,
        device=device,
    )
    inputs["qk_l2norm"] = True
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    wanted = op.reference(**exact)
    request = Request.of(case.op, inputs["q"], inputs["v"])
    runs = {"transformers": _transformers(case)}
    runs |= {kernel.backend: kernel.fn for kernel in registry.kernels(case.op) if kernel.why_not(request) is None}
    decode = {"inplace": True} if case.op.startswith("recurrent") else {}

    rows: list[Row] = []
    for backend, run in runs.items():
        error = _error(run(**inputs), wanted)
        if not error <= ERROR[dtype]:
            rows.append(Row(case.op, case.batch, case.tokens, backend, NAN, NAN, NAN, NAN, error))
            continue
        state = inputs["initial_state"].clone()

        def call(run=run, state=state) -> Any:
            return run(**{**inputs, "initial_state": state}, **decode)

        ms = 1e3 * _seconds(call, device, seconds)
        mib = peak_bytes(call, device) / 2**20
        first = rows[0] if rows else None
        ratios = (first.ms / ms, mib / first.extra_mib) if first else (1.0, 1.0)
        rows.append(Row(case.op, case.batch, case.tokens, backend, ms, ratios[0], mib, ratios[1], error))
    return rows


def main(device_name: str | None, json_file: str | None) -> bool:
    """Measure every case, print the table and, last, one line of JSON. Returns whether every result was right."""
    device = models.pick_device(device_name)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    table = Table(
        "op", "B", "T", "backend", "ms", "speed-up", "extra MiB", "memory ratio", "error",
        title=f"K = V = {HEAD_DIM}, {dtype}, on {device}; ratios to transformers' torch function",
    )  # fmt: skip
    rows = []
    for case in CASES:
        for row in measure(case, device, dtype):
            rows.append(row)
            wrong = row.ms != row.ms
            cells = ["wrong result"] * 4 if wrong else [
                f"{row.ms:.3f}", f"{row.speedup:.2f}x", f"{row.extra_mib:.1f}", f"{row.memory_ratio:.2f}"
            ]  # fmt: skip
            table.add_row(row.op, str(row.batch), str(row.tokens), row.backend, *cells, f"{row.error:.1e}")
    machine.console().print(table)
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.machine(device), "versions": machine.versions(), "dtype": str(dtype),
        "head_dim": HEAD_DIM, "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    if json_file is not None:
        try:
            Path(json_file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{json_file!r} cannot be written: {error.strerror}") from error
    print(json.dumps(result))
    return all(row.ms == row.ms for row in rows)
