"""Every op at the shapes of named models, on every backend that can serve, no time without a right result.

A row holds the latency (median, 10th and 90th percentile), the useful TFLOP/s and GB/s and their shares of what this
machine reaches in a matrix product and in a copy, the peak of extra memory, the speed-up over transformers' torch
function, and beside every time the relative error against the float64 oracle. `kernel_cases` says what is measured,
`timing` how, `roofline` what work is useful, `kernel_oracle` what is right.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch

from .. import gradients
from ..errors import reason
from ..loading.shapes import SHAPES
from . import candidates, goals, kernel_oracle
from .accuracy import OP_ERROR
from .kernel_cases import Case, is_decode, is_delta_rule
from .kernel_results import Ceilings, KernelRow
from .options import KernelBenchOptions
from .roofline import flops, moved_bytes
from .timing import captured, clock, peak_bytes, times

FADING = 0.04  # of the decay in repeated steps


def measure(case: Case, options: KernelBenchOptions, device: torch.device, dtype: torch.dtype) -> KernelRow:
    """One row of the table. Lists of rows are completed by `with_ratios` and `with_shares`.

    Returns:
        The case with its dimensions and dtype, and

        ``ms``, ``low``, ``high``: median, 10th and 90th percentile of ``runs`` runs, milliseconds;
        ``first_ms``: the first call of all, with what is imported and compiled then, and was not before;
        ``tflop_s``, ``gb_s``: useful work a second, and ``extra_mib``: peak memory beyond what was allocated before;
        ``error``, ``worst``: the largest relative error over all results, and whose it is, None when something is not
        finite; ``budget``: what is allowed; ``oracle``: ``"loop"`` or ``"eager float64"``;
        ``passed``: the error is within the budget. False as well when the backend failed; None when memory ran out;
        ``note``: why there is no time; then all figures but the error are None.
    """
    shape = SHAPES[case.shape]
    row = KernelRow(
        **asdict(case),
        k_heads=shape.k_heads,
        v_heads=shape.v_heads,
        head_k_dim=shape.k_dim,
        head_v_dim=shape.v_dim,
        dtype=str(dtype).removeprefix("torch."),
        gpu_graph=options.gpu_graph,
        budget=OP_ERROR[dtype],
        goal_ms=goals.of_op(case.op, case.shape, case.batch, case.tokens, options.gpu_graph, device),
    )
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), candidates.on_its_own(case.backend):
            prepared = kernel_oracle.prepare(case, device, dtype, options.normalized)
            row = _filled(replace(row, oracle=prepared.oracle), prepared, options, device)
    except torch.OutOfMemoryError:
        row = replace(row, note="out of memory")
    if row.note is not None and device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _judged(row: KernelRow, got: kernel_oracle.Results, wanted: kernel_oracle.Results) -> KernelRow:
    """With the error of a result."""
    off, worst = kernel_oracle.error(got, wanted)
    assert row.budget is not None
    passed = off <= row.budget
    return replace(
        row,
        worst=worst,
        error=off if math.isfinite(off) else None,
        passed=passed,
        note=None if passed else f"wrong result: {worst}",
    )


def _filled(
    row: KernelRow, prepared: kernel_oracle.OracleCase, options: KernelBenchOptions, device: torch.device
) -> KernelRow:
    """Check the backend's result and, if it is right, time it."""
    found = candidates.candidates(row.op, SHAPES[row.shape].model_type)
    kernel = next(kernel for kernel in found if kernel.backend == row.backend)
    decode, backward = is_decode(row.op), row.direction == "backward"
    function = gradients.with_backward(kernel) if backward and gradients.has_backward(kernel) else kernel.fn
    try:
        with torch.enable_grad() if backward else torch.inference_mode():
            run = prepared.call(function)
            first, got = clock(run, device)
            row = _judged(row, got, prepared.wanted)
            if not row.passed:
                return row
            del got
            if options.gpu_graph:
                fresh = prepared.call(function)
                replay = captured(fresh, device)
                if decode:  # the warm-ups went on from step to step
                    _put_back(replay(), prepared)
                row = _judged(row, replay(), prepared.wanted)
                if not row.passed:
                    return row
            timed = prepared.call(function, FADING) if decode else run
            took = sorted(times(timed, options.seconds, device, options.gpu_graph))
            peak = peak_bytes(run, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of another package, or a compiler: the row says so, and the others are not lost
        return replace(row, passed=False, note=f"failed: {reason(error)}")
    ms, last = statistics.median(took), len(took) - 1
    tflop_s, gb_s = _rates(row, prepared, ms)
    return replace(
        row,
        ms=ms,
        low=took[last // 10],
        high=took[last - last // 10],
        runs=len(took),
        first_ms=first,
        tflop_s=tflop_s,
        gb_s=gb_s,
        extra_mib=peak / 2**20,
    )


def _put_back(updated: kernel_oracle.Results, prepared: kernel_oracle.OracleCase) -> None:
    """Write the states that a step started from where it updates them."""
    for name, tensor in updated.items():
        start = prepared.inputs.get("initial_state" if name == "final_state" else name)
        if start is not None:
            tensor.copy_(start)


def _rates(row: KernelRow, prepared: kernel_oracle.OracleCase, ms: float) -> tuple[float | None, float]:
    """Useful work and bytes a second; the ops around the delta rule have no work that matters."""
    if not is_delta_rule(row.op):
        return None, kernel_oracle.moved_bytes_of_layer_op(prepared) / ms / 1e6
    shape = SHAPES[row.shape]
    size: dict[str, Any] = dict(
        batch=row.batch,
        tokens=row.tokens,
        k_heads=shape.k_heads,
        v_heads=shape.v_heads,
        k_dim=shape.k_dim,
        v_dim=shape.v_dim,
        backward=row.direction == "backward",
    )
    moved = moved_bytes(row.op, itemsize=prepared.inputs["q"].dtype.itemsize, **size)
    return flops(row.op, **size) / ms / 1e9, moved / ms / 1e6


def with_ratios(rows: Iterable[KernelRow]) -> list[KernelRow]:
    """Rows with ``speedup`` and ``memory_ratio`` to transformers' torch function in the same call of the same run."""

    def call(row: KernelRow) -> tuple:
        return row.op, row.shape, row.batch, row.tokens, row.direction

    rows = list(rows)
    base = {call(row): row for row in rows if row.backend == "transformers"}
    filled = []
    for row in rows:
        other = base.get(call(row))
        if other is not None and other.ms is not None and row.ms is not None:
            memory = row.extra_mib / other.extra_mib if row.extra_mib is not None and other.extra_mib else None
            row = replace(row, speedup=other.ms / row.ms, memory_ratio=memory)
        filled.append(row)
    return filled


def with_shares(rows: Iterable[KernelRow], ceilings: Ceilings) -> list[KernelRow]:
    """Rows with ``share_compute`` and ``share_bandwidth``, of the machine's own `ceilings`; None where no time is."""

    def share(rate: float | None, most: float) -> float | None:
        return None if rate is None else rate / most

    return [
        replace(
            row,
            share_compute=share(row.tflop_s, ceilings.matmul_tflop_s),
            share_bandwidth=share(row.gb_s, ceilings.copy_gb_s),
        )
        for row in rows
    ]
