"""What a call costs: time and memory.

Times are taken by others' timers. On a CUDA device `triton.testing.do_bench` times one Python call between two events
and flushes the second-level cache before each; with a CUDA graph `do_bench_cudagraph` times calls unrolled in one
graph, which is what the device takes without Python and launches, and flushes nothing. Elsewhere it is
`torch.utils.benchmark.Timer`, whose runs are blocks of calls where one call is short.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import benchmark

FEWEST = 3  # runs of one measurement

Run = Callable[[], Any]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts the memory, is talkative


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clock(run: Run, device: torch.device) -> tuple[float, Any]:
    """Milliseconds of one run by the clock, and what it returned: of calls that cannot be repeated."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start), result


def has_triton() -> bool:
    """Whether Triton's timers are there; they are not on every system."""
    return importlib.util.find_spec("triton") is not None


def times(run: Run, seconds: float, device: torch.device, gpu_graph: bool = False) -> list[float]:
    """Milliseconds of runs of a call, at least 3 of them.

    Args:
        run: the call.
        seconds: budget, without warming up.
        device: the device it runs on; CUDA's current one.
        gpu_graph: in a CUDA graph.
    """
    once = clock(run, device)[0] / 1e3
    budget, found = max(seconds, (FEWEST - 0.5) * once), list[float]()
    while len(found) < FEWEST:  # a call may be faster the second time, and the budget then be one for fewer runs
        if device.type != "cuda" or not has_triton():
            found += _by_torch(run, budget, device)
        else:
            found += _by_triton(run, budget, gpu_graph)
    return found


def _by_triton(run: Run, seconds: float, gpu_graph: bool) -> list[float]:
    import triton.testing

    if gpu_graph:  # it replays a graph of as many calls as take `rep` ten times
        return triton.testing.do_bench_cudagraph(run, rep=max(1, round(100 * seconds)), return_mode="all")
    return triton.testing.do_bench(run, rep=max(1, round(1e3 * seconds)), return_mode="all")


def _by_torch(run: Run, seconds: float, device: torch.device) -> list[float]:
    def run_and_wait() -> None:
        run()
        synchronize(device)

    called = run if device.type == "cpu" else run_and_wait
    timer = benchmark.Timer("called()", globals={"called": called}, num_threads=torch.get_num_threads())
    return [1e3 * second for second in timer.blocked_autorange(min_run_time=seconds).times]


def captured(run: Run, device: torch.device) -> Run:
    """Capture one call in a CUDA graph. The function returned replays it and returns the same tensors every time.

    Of our own, since Triton's timer does not give the results of what it captures: they are checked with this.
    """
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
