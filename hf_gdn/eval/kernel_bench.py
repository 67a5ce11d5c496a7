"""Every op at the shapes of named models, on every backend that can serve, no time without a right result.

A row holds the latency (median, 10th and 90th percentile), the useful TFLOP/s and GB/s and their shares of what this
machine reaches in a matrix product and in a copy, the peak of extra memory, the speed-up over transformers' torch
function, and beside every time the relative error against the float64 oracle. `hf_gdn.eval.kernel_cases` says what is
measured, `hf_gdn.eval.timing` how work and time are taken, `hf_gdn.eval.kernel_oracle` what is right.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch

from ..errors import reason
from . import candidates, kernel_oracle
from .kernel_cases import SHAPES, Case, KernelBenchOptions, key, left_out, plan, target
from .timing import captured, ceilings, clock, flops, moved_bytes, peak_bytes, timer

__all__ = [
    "SHAPES",
    "Case",
    "KernelBenchOptions",
    "ceilings",
    "key",
    "left_out",
    "measure",
    "peak_bytes",
    "plan",
    "target",
    "with_ratios",
    "with_shares",
]

Row = dict[str, Any]

# Relative Frobenius error allowed: the operator's own bar per dtype, and 1e-5 in fp32 (2^-24 times some hundred terms).
ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}

# ------------------------------------------------------------------------------------------------------------- a row


def measure(case: Case, options: KernelBenchOptions) -> Row:
    """One row of the table, JSON. Lists of rows are completed by `with_ratios` and `with_shares`.

    Returns:
        The case with its dimensions and dtype, and

        ``ms``, ``low``, ``high``: median, 10th and 90th percentile of ``runs`` runs, milliseconds;
        ``first_ms``: the first call of all, with what is imported and compiled then, and was not before;
        ``tflop_s``, ``gb_s``: useful work a second, and ``extra_mib``: peak memory beyond what was allocated before;
        ``error``, ``worst``: the largest relative error over output, final state and gradients, and whose it is, None
        when something is not finite; ``budget``: what is allowed; ``oracle``: ``"loop"`` or ``"eager float64"``;
        ``passed``: the error is within the budget. False as well when the backend failed; None when memory ran out;
        ``note``: why there is no time; then all figures but the error are None.
    """
    device, dtype = target(options)
    shape = SHAPES[case.shape]
    row: Row = dict(
        op=case.op,
        shape=case.shape,
        batch=case.batch,
        tokens=case.tokens,
        k_heads=shape.k_heads,
        v_heads=shape.v_heads,
        head_k_dim=shape.k_dim,
        head_v_dim=shape.v_dim,
        dtype=str(dtype).removeprefix("torch."),
        direction=case.direction,
        backend=case.backend,
        gpu_graph=options.gpu_graph,
    )
    row |= dict.fromkeys(
        (
            "ms",
            "low",
            "high",
            "runs",
            "first_ms",
            "tflop_s",
            "gb_s",
            "share_compute",
            "share_bandwidth",
            "speedup",
            "memory_ratio",
            "extra_mib",
            "error",
            "worst",
            "oracle",
            "passed",
            "note",
        )
    )
    row["budget"] = ERROR[dtype]
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), candidates.on_its_own(case.backend):
            job = kernel_oracle.prepare(case, device, dtype)
            row["oracle"] = job.oracle
            _fill(row, case, job, options)
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    if row["note"] is not None and device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _fill(row: Row, case: Case, job: kernel_oracle.OracleCase, options: KernelBenchOptions) -> None:
    """Check the backend's result and, if it is right, time it."""
    device, dtype = target(options)
    shape = SHAPES[case.shape]
    kernel = next(
        kernel for kernel in candidates.candidates(case.op, shape.model_type) if kernel.backend == case.backend
    )
    inplace, backward = case.op.startswith("recurrent"), case.direction == "backward"

    def right(got: kernel_oracle.Results) -> bool:
        off, row["worst"] = kernel_oracle.error(got, job.wanted)
        row["error"] = off if math.isfinite(off) else None
        row["passed"] = off <= row["budget"]
        row["note"] = None if row["passed"] else f"wrong result: {row['worst']}"
        return row["passed"]

    try:
        with torch.enable_grad() if backward else torch.inference_mode():
            run = plain = kernel_oracle.call(kernel.fn, job.inputs, job.weights, inplace)
            first, got = clock(plain, device)
            if not right(got):
                return
            del got
            if options.gpu_graph:
                run = captured(plain, device)
                if inplace:  # the warm-ups went on from step to step
                    run()["final_state"].copy_(job.inputs["initial_state"])
                if not right(run()):
                    return
            elif inplace:  # repeated on one state, the gate of the check fades it to denormal numbers, slow on CPUs
                run = kernel_oracle.call(kernel.fn, {**job.inputs, "g": job.inputs["g"] * 0.04}, None, inplace)
            took = sorted(timer(device, options.gpu_graph)(run, options.seconds, device))
            peak = peak_bytes(plain, device)
    except torch.OutOfMemoryError:
        row["passed"] = None
        raise
    except Exception as error:  # of another package, or a compiler: the row says so, and the others are not lost
        row["passed"], row["note"] = False, f"failed: {reason(error)}"
        return
    ms, last = statistics.median(took), len(took) - 1
    size: dict[str, Any] = dict(
        batch=case.batch,
        tokens=case.tokens,
        k_heads=shape.k_heads,
        v_heads=shape.v_heads,
        k_dim=shape.k_dim,
        v_dim=shape.v_dim,
        backward=backward,
    )
    row |= dict(
        ms=ms,
        low=took[last // 10],
        high=took[last - last // 10],
        runs=len(took),
        first_ms=first,
        tflop_s=flops(case.op, **size) / ms / 1e9,
        gb_s=moved_bytes(case.op, itemsize=dtype.itemsize, **size) / ms / 1e6,
        extra_mib=peak / 2**20,
    )


# ------------------------------------------------------------------------------------------------------------ all rows


def with_ratios(rows: Iterable[Row]) -> list[Row]:
    """Rows with ``speedup`` and ``memory_ratio`` to transformers' torch function in the same call of the same run."""

    def call(row: Row) -> tuple:
        return tuple(row[name] for name in ("op", "shape", "batch", "tokens", "direction"))

    rows = list(rows)
    base = {call(row): row for row in rows if row["backend"] == "transformers" and row["ms"] is not None}
    filled = []
    for row in rows:
        other = base.get(call(row))
        if other is not None and row["ms"] is not None:
            memory = row["extra_mib"] / other["extra_mib"] if other["extra_mib"] else None
            row = {**row, "speedup": other["ms"] / row["ms"], "memory_ratio": memory}
        filled.append(row)
    return filled


def with_shares(rows: Iterable[Row], ceilings: dict[str, float]) -> list[Row]:
    """Rows with ``share_compute`` and ``share_bandwidth``, of the machine's own `ceilings`; None where no time is."""
    return [
        row
        if row["ms"] is None
        else {
            **row,
            "share_compute": row["tflop_s"] / ceilings["matmul_tflop_s"],
            "share_bandwidth": row["gb_s"] / ceilings["copy_gb_s"],
        }
        for row in rows
    ]
