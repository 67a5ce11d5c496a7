"""What is timed, by which timer, and how often."""

import contextlib
import time
import types

import pytest
import torch

from hf_gdn.eval import timing

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_is_timed_by_torch():
    found = timing.times(lambda: time.sleep(0.004), 0.05, CPU)
    assert len(found) >= timing.FEWEST and all(4 < ms < 400 for ms in found)


def test_slow_calls_are_timed_three_times_at_least():
    calls = []
    found = timing.times(lambda: calls.append(time.sleep(0.03)), 1e-3, CPU)
    assert len(found) >= timing.FEWEST and len(calls) <= 8


def test_short_calls_are_timed_in_blocks():
    calls = []
    found = timing.times(lambda: calls.append(1), 0.02, CPU)
    assert len(calls) > 10 * len(found) and all(ms < 1 for ms in found)


@pytest.fixture
def pretended(monkeypatch):
    """A CUDA device on which an eager call takes 3 ms and a replay 0.25 ms, and Triton's timers."""
    testing = pytest.importorskip("triton.testing")
    log = types.SimpleNamespace(captures=0, replays=0, asked=[])

    class Graph:
        def replay(self):
            log.replays += 1

    @contextlib.contextmanager
    def capture(graph):
        log.captures += 1
        yield

    def do_bench(run, **options):
        log.asked.append(("do_bench", options))
        run()
        return [3.0, 3.5]

    def do_bench_cudagraph(run, **options):
        log.asked.append(("do_bench_cudagraph", options))
        run()
        return [0.25] * 10

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": lambda device: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device: stream,
        "synchronize": lambda device: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(testing, "do_bench", do_bench)
    monkeypatch.setattr(testing, "do_bench_cudagraph", do_bench_cudagraph)
    return log


def test_a_gpu_is_timed_by_triton_until_there_are_three_runs(pretended):
    assert timing.times(lambda: None, 0.5, GPU) == [3.0, 3.5] * 2
    assert pretended.asked == [("do_bench", {"rep": 500, "return_mode": "all"})] * 2


def test_in_a_graph_too(pretended):
    assert timing.times(lambda: None, 0.5, GPU, gpu_graph=True) == [0.25] * 10
    assert pretended.asked == [("do_bench_cudagraph", {"rep": 50, "return_mode": "all"})]


def test_a_gpu_without_triton_is_timed_by_torch(pretended, monkeypatch):
    monkeypatch.setattr(timing, "has_triton", lambda: False)
    assert len(timing.times(lambda: None, 1e-3, GPU)) >= 3 and not pretended.asked


def test_what_is_captured_runs_once_more_and_is_replayed(pretended):
    calls = []

    def run():
        calls.append(1)
        return len(calls)

    replay = timing.captured(run, GPU)
    assert len(calls) == 4 and pretended.captures == 1 and pretended.replays == 0  # three to warm up, one captured
    assert replay() == 4 and pretended.replays == 1 and len(calls) == 4
