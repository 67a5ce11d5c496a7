"""What a call costs, time, memory, useful work, and what this machine can do at most.

Useful work is the algorithm's, not the implementation's, so that backends compare: `flops` and `moved_bytes` say how it
is counted. Times are of one Python call by the clock, on a GPU between two events; the second-level cache is not
flushed and every call reads the same tensors, so small cases may read them from there. With `--gpu-graph` one call is
captured in a CUDA graph and its replays are timed: what the device takes, without Python and launches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

CHUNK = 64
# Runs of one measurement.
FEWEST, MOST = 3, 200

Run = Callable[[], Any]
# Called with what to run, a budget in seconds and the device: milliseconds of every run.
Timer = Callable[[Run, float, torch.device], list[float]]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts the memory, is talkative

# -------------------------------------------------------------------------------------------------------- useful work


def flops(
    op: str, *, batch: int, tokens: int, k_heads: int, v_heads: int, k_dim: int, v_dim: int, backward: bool = False
) -> int:
    """Floating-point operations of a call.

    A product of ``[m, k]`` and ``[k, n]`` counts 2mkn, tiles of C = 64 tokens whole, as matrix units compute them.

    Chunked, per token (docs/delta_rule.md, "Chunks"):

        K Kᵀ and Q Kᵀ                              4 C K    a key head; a value head where each has its own decays (KDA)
        (e^G∘K) S and (e^G∘Q) S                    4 K V    a value head
        (I + A)⁻¹ diag(β) times its right side     2 C V    a value head
        P U                                        2 C V    a value head
        (e^(G_C - G)∘K)ᵀ U                         2 K V    a value head

    The inverse, C²/3 a token by substitution, and what is elementwise are left out: about 1 % at K = V = 128.

    Recurrent, per token and value head: what the state answers to k and to q, 2 K V each, and its decay, the outer
    product and their sum, 3 K V: 7 K V.

    Forward and backward is 3 times the forward: the gradients of a product are two products of its size. What an
    implementation computes a second time in its backward does not count.
    """
    if op.startswith("recurrent"):
        token = 7 * v_heads * k_dim * v_dim
    else:
        scored = v_heads if op.endswith("kda") else k_heads
        token = 4 * CHUNK * k_dim * scored + (4 * CHUNK * v_dim + 6 * k_dim * v_dim) * v_heads
    return batch * tokens * token * (3 if backward else 1)


def moved_bytes(
    op: str,
    *,
    batch: int,
    tokens: int,
    k_heads: int,
    v_heads: int,
    k_dim: int,
    v_dim: int,
    itemsize: int,
    backward: bool = False,
) -> int:
    """Bytes that a call has to read and write: every input once, every output once.

    Per token, with e bytes for an element of q, k, v, beta and o, and 4 for one of g:

        in   e (2 K) a key head, e (V + 1) + 4 (1, or K for KDA) a value head;  out   e V a value head

    and once per sequence and value head the state of 4 K V bytes, read and written.

    Forward and backward is 3 in + 2 out: the forward's in + out, then inputs and the gradients of the outputs are read
    and the gradients of the inputs written. What an implementation keeps for its backward does not count.
    """
    decays = k_dim if op.endswith("kda") else 1
    state = batch * v_heads * 4 * k_dim * v_dim
    read = itemsize * 2 * k_dim * k_heads + (itemsize * (v_dim + 1) + 4 * decays) * v_heads
    read, written = batch * tokens * read + state, batch * tokens * itemsize * v_dim * v_heads + state
    return 3 * read + 2 * written if backward else read + written


# ----------------------------------------------------------------------------------------------------- time and memory


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clock(run: Run, device: torch.device) -> tuple[float, Any]:
    """Milliseconds of one run by the clock, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start), result


def samples(once: Callable[[], float], seconds: float) -> list[float]:
    """What `once` returns, milliseconds, as often as fits the budget after one warm-up; at least 3 times."""
    count = max(FEWEST, min(MOST, int(1e3 * seconds / max(once(), 1e-3))))
    return [once() for _ in range(count)]


def clocked(run: Run, seconds: float, device: torch.device) -> list[float]:
    """Milliseconds by the clock."""
    return samples(lambda: clock(run, device)[0], seconds)


def _between_events(run: Run, device: torch.device) -> float:
    """Milliseconds of one run between two events on an idle CUDA device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def evented(run: Run, seconds: float, device: torch.device) -> list[float]:
    """Milliseconds of one Python call each, between CUDA events."""
    return samples(lambda: _between_events(run, device), seconds)


def repeated(run: Run, seconds: float, device: torch.device) -> list[float]:
    """Milliseconds a call, as many calls between two events as take about 1 ms: for replays, which cost no Python."""
    run()
    repeat = max(1, min(100, round(1 / max(_between_events(run, device), 1e-3))))

    def runs() -> None:
        for _ in range(repeat):
            run()

    return [ms / repeat for ms in samples(lambda: _between_events(runs, device), seconds)]


def timer(device: torch.device, gpu_graph: bool = False) -> Timer:
    """How runs are timed on a device; with `gpu_graph` they are what `captured` returned."""
    if device.type != "cuda":
        return clocked
    return repeated if gpu_graph else evented


def captured(run: Run, device: torch.device) -> Run:
    """Capture one call in a CUDA graph. The function returned replays it and returns the same tensors every time."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # whatever is compiled or allocated once has to happen before the capture
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def peak_bytes(run: Run, device: torch.device) -> int:
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


# ------------------------------------------------------------------------------------------------------------ ceilings


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine can do at most, the best of a few runs each.

    Returns:
        ``copy_gb_s``: GB/s of a copy, read and write counted, 1 GiB to 1 GiB (256 MiB on a CPU), beyond its caches.
        ``matmul_tflop_s``: TFLOP/s of n x n matrix products of `dtype`, or of float32 where those are faster, since a
        kernel may compute in either; n the power of two from 256 to 8192 that does best, none larger than the first
        that takes 10 ms.
    """
    with torch.inference_mode():
        rates = [_matmul(device, used) for used in {dtype, torch.float32}]
        return {"copy_gb_s": _copy(device), "matmul_tflop_s": max(rates)}


def _copy(device: torch.device) -> float:
    source = torch.ones(2**26 if device.type == "cpu" else 2**28, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    return 2 * source.nbytes / min(timer(device)(lambda: copy.copy_(source), 0.2, device)) / 1e6


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    best, n, ms = 0.0, 256, 0.0
    while n <= 8192 and ms < 10:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        ms = min(timer(device)(lambda a=a, b=b: a @ b, 0.05, device))  # type: ignore[misc]
        best = max(best, 2 * n**3 / ms / 1e9)
        n *= 2
    return best
