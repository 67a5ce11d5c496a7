"""One whole layer at full width: what a prompt and what a token costs, original and patched, projections included.

The sides take turns: the original, the patched layer on each backend, and the layer's projections alone, which is what
no kernel of ours can save. A patched side's output is compared with the original's before it is timed.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import BackendError, PatchError, reason
from ..loading.layers import make_layer
from ..loading.quantization import quantize
from ..loading.shapes import SHAPES
from ..patches import patched, unpatched
from ..upstream import cache_names, tensors
from . import candidates, goals, kernel_oracle
from .accuracy import LAYER_ERROR
from .kernel_results import Ceilings, LayerRow
from .layer_cases import Case
from .options import KernelBenchOptions
from .timing import clock, synchronize, times

ORIGINAL, PROJECTIONS = "original", "projections alone"
_BEFORE, _CHECKED = 8, 4  # tokens in the cache before a step; steps that are compared
_FIRST_TOKENS = 512


# --------------------------------------------------------------------------------------------------------------- sides


@dataclass
class _Side:
    """What is timed, and what it gave.

    Args:
        patch: puts the side in force.
        run: one call; on CUDA graphs too.
        check: run once before: what is compared, and milliseconds of the first call; None for the projections.
    """

    patch: Callable[[], AbstractContextManager[Any]]
    run: Callable[[], Any]
    check: Callable[[], tuple[Tensor, float]] | None
    turns: list[float] = field(default_factory=list)
    runs: int = 0


def _calls(layer: nn.Module, config: Any, x: Tensor, case: Case) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A call to be timed and one to be checked, on a cache of their own."""
    device = x.device
    if case.phase == "prefill":
        run: Callable[[], Any] = functools.partial(layer, x)

        def prefill() -> tuple[Tensor, float]:
            first, out = clock(run, device)
            return out, first

        return run, prefill
    cache = DynamicCache(config=config)
    # Of its own: with the strides of 8 tokens a layer takes 30 times as long in bf16 on a CPU.
    token = x[:, 0].flatten().clone().view(case.batch, 1, -1)
    step = functools.partial(layer, token, **cache_names.as_layer_argument(layer, cache))

    def decode() -> tuple[Tensor, float]:
        layer(x, **cache_names.as_layer_argument(layer, cache))
        first, out = clock(step, device)
        return torch.cat([out, *(step() for _ in range(_CHECKED - 1))], 1), first

    return step, decode


def _projections(layer: nn.Module, config: Any, x: Tensor, case: Case) -> Callable[[], Any]:
    """The layer's Linear modules on what they are given in a call of the original."""
    given: list[tuple[nn.Module, Tensor]] = []
    linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    run, check = _calls(layer, config, x, case)
    with unpatched():
        check()
        hooks = [
            module.register_forward_hook(lambda module, inputs, out: given.append((module, inputs[0].clone())))
            for module in linear
        ]
        run()
    for hook in hooks:
        hook.remove()
    return lambda: [module(x) for module, x in given]


def measure(case: Case, options: KernelBenchOptions, device: torch.device, dtype: torch.dtype) -> list[LayerRow]:
    """A case's rows: the original, the patched layer on each backend, the projections alone."""
    base = LayerRow(
        shape=case.shape,
        phase=case.phase,
        batch=case.batch,
        tokens=case.tokens,
        side=ORIGINAL,
        dtype=str(dtype).removeprefix("torch."),
        quantize=options.quantize,
        gpu_graph=options.gpu_graph,
    )
    sides = (ORIGINAL, *case.backends, PROJECTIONS)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), torch.inference_mode():
            return _measured(base, case, options, device, dtype)
    except torch.OutOfMemoryError:
        return [replace(base, side=name, note="out of memory") for name in sides]


def _measured(
    base: LayerRow, case: Case, options: KernelBenchOptions, device: torch.device, dtype: torch.dtype
) -> list[LayerRow]:
    family = SHAPES[case.shape].model_type
    layer, config = make_layer(case.shape, device, dtype)
    quantize(layer, options.quantize)
    tokens = _BEFORE if case.phase == "decode" else case.tokens
    random = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, tokens, config.hidden_size, generator=random).to(device, dtype)
    moved_bytes, flops = _work(layer, x, case)
    base = replace(base, moved_bytes=moved_bytes, flops=flops)
    sides = {ORIGINAL: _Side(unpatched, *_calls(layer, config, x, case))}
    for backend in case.backends:
        patch = functools.partial(patched, family, backend=backend, strict=True)
        sides[backend] = _Side(patch, *_calls(layer, config, x, case))
    sides[PROJECTIONS] = _Side(unpatched, _projections(layer, config, x, case), None)
    rows, wanted = {}, None
    for name, side in sides.items():
        rows[name], out = _checked(replace(base, side=name), side, wanted)
        wanted = out if wanted is None else wanted
    timed = {name: side for name, side in sides.items() if rows[name].note is None}
    for _, (name, side) in itertools.product(range(options.rounds), timed.items()):
        if rows[name].note is None:
            try:
                with side.patch():
                    took = times(side.run, options.seconds / options.rounds, device, options.gpu_graph)
            except (RuntimeError, PatchError) as error:  # what cannot be captured in a graph
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                rows[name] = replace(rows[name], passed=False, note=f"failed: {reason(error)}")
                continue
            side.turns.append(statistics.median(took))
            side.runs += len(took)
    return _with_times(rows, sides, device)


def _work(layer: nn.Module, x: Tensor, case: Case) -> tuple[int, int]:
    """Bytes that a call has to move at least, and floating-point operations of its projections.

    Every weight is read once, the layer's input read and its output written, and in a decode step the convolution's
    window and the fp32 state are read and written.
    """
    shape = SHAPES[case.shape]
    rows = case.batch * case.tokens
    weights = [part for weight in layer.parameters() for part in tensors.parts(weight) or [weight]]
    moved = sum(part.nbytes for part in weights) + 2 * rows * x.shape[-1] * x.itemsize
    if case.phase == "decode":
        window = sum(m.in_channels * m.kernel_size[0] for m in layer.modules() if isinstance(m, nn.Conv1d))
        state = shape.v_heads * shape.k_dim * shape.v_dim
        moved += 2 * case.batch * (window * x.itemsize + 4 * state)
    return moved, 2 * rows * sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))


def _checked(row: LayerRow, side: _Side, wanted: Tensor | None) -> tuple[LayerRow, Tensor | None]:
    """The row of a side with its error, and its output."""
    if side.check is None:
        return row, None
    budget = LAYER_ERROR[getattr(torch, row.dtype)]
    try:
        with side.patch():
            out, first = side.check()
    except (BackendError, PatchError) as error:
        return replace(row, passed=False, note=f"failed: {reason(error)}"), None
    if wanted is None:
        return replace(row, first_ms=first), out
    off, _ = kernel_oracle.error({"y": out}, {"y": wanted})
    return replace(
        row,
        first_ms=first,
        error=off if math.isfinite(off) else None,
        budget=budget,
        passed=off <= budget,
        note=None if off <= budget else "wrong result",
    ), out


def _with_times(rows: dict[str, LayerRow], sides: dict[str, _Side], device: torch.device) -> list[LayerRow]:
    medians = {
        name: statistics.median(side.turns) for name, side in sides.items() if side.turns and rows[name].note is None
    }
    found = []
    for name, row in rows.items():
        if name in medians:
            ms, turns = medians[name], sides[name].turns
            original, alone = medians.get(ORIGINAL), medians.get(PROJECTIONS)
            beside = [a - b for a, b in zip(turns, sides[PROJECTIONS].turns)]  # of the same turn: machines are noisy
            row = replace(
                row,
                ms=ms,
                low=min(turns),
                high=max(turns),
                runs=sides[name].runs,
                speedup=None if original is None else original / ms,
                share_projections=None if alone is None else alone / ms,
                beside_ms=None if alone is None or name == PROJECTIONS else statistics.median(beside),
            )
            if name not in (ORIGINAL, PROJECTIONS):
                row = replace(row, goal_ms=goals.of_layer(row, device, original=original, projections=alone))
        found.append(row)
    return found


def with_floors(rows: Iterable[LayerRow], ceilings: Ceilings) -> list[LayerRow]:
    """Rows with ``floor_ms``: what has to be moved at the rate of a copy, or the projections' products, if longer."""
    return [
        row
        if row.moved_bytes is None or row.flops is None
        else replace(
            row,
            floor_ms=max(row.moved_bytes / ceilings.copy_gb_s / 1e6, row.flops / ceilings.matmul_tflop_s / 1e9),
        )
        for row in rows
    ]


# --------------------------------------------------------------------------------------------------------- first calls


def first_calls(shape: str, device: torch.device, dtype: torch.dtype) -> list[LayerRow]:
    """A new process's first prefill of 512 tokens and first token, patched, with Triton's cache empty and filled."""
    name, rows = str(dtype).removeprefix("torch."), []
    code = f"from hf_gdn.eval.layer_bench import first_call; print(first_call({shape!r}, {str(device)!r}, {name!r}))"
    with tempfile.TemporaryDirectory() as folder:
        for cache in goals.FIRST_CALL:
            ran = subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "TRITON_CACHE_DIR": folder},
                capture_output=True,
                text=True,
            )
            row = LayerRow(
                shape,
                "first call",
                1,
                _FIRST_TOKENS,
                f"patched, Triton's cache {cache}",
                name,
                goal_ms=goals.FIRST_CALL[cache] if device.type == "cuda" else None,
            )
            if ran.returncode:
                last = (ran.stderr.strip() or "no message").splitlines()[-1]
                rows.append(replace(row, passed=False, note=f"failed: {last}"))
            else:
                rows.append(replace(row, ms=float(ran.stdout.split()[-1]), runs=1))
    return rows


def first_call(shape: str, device_name: str, dtype_name: str) -> float:
    """Milliseconds of it, in this process; what importing costs is not counted."""
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    layer, config = make_layer(shape, device, dtype)
    x = torch.randn(1, _FIRST_TOKENS, config.hidden_size, device=device, dtype=dtype)
    with patched(strict=True), torch.inference_mode():
        candidates.backends()  # loads the kernels
        given = cache_names.as_layer_argument(layer, DynamicCache(config=config))
        synchronize(device)

        def both() -> Any:
            layer(x, **given)
            return layer(x[:, :1].clone(), **given)

        return clock(both, device)[0]
