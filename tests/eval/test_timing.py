"""Useful work by hand and by torch's own count, the machine's ceilings, and what the timers time."""

import contextlib
import types

import pytest
import torch

from hf_gdn import registry
from hf_gdn.eval import timing

SMALL = dict(batch=3, tokens=5, k_heads=1, v_heads=2, k_dim=2, v_dim=3)


@pytest.mark.parametrize(
    ("op", "flops", "moved"),
    [
        # 4·64·2 once, (4·64·3 + 6·2·3) twice, 15 tokens; 15·(2·4 + 2·(8 + 4)) + 144 in, 15·12 + 144 out
        ("chunk_gdn", 15 * (512 + 2 * 804), (15 * 32 + 144, 15 * 12 + 144)),
        # scores of each value head; two decays a token and head
        ("chunk_kda", 15 * 2 * (512 + 804), (15 * 40 + 144, 15 * 12 + 144)),
        # 7·2·3 a token and head
        ("recurrent_gdn", 15 * 2 * 42, (15 * 32 + 144, 15 * 12 + 144)),
        ("recurrent_kda", 15 * 2 * 42, (15 * 40 + 144, 15 * 12 + 144)),
    ],
)
def test_useful_work_by_hand(op, flops, moved):
    assert timing.flops(op, **SMALL) == flops and timing.flops(op, backward=True, **SMALL) == 3 * flops
    assert 3 * 2 * 4 * 2 * 3 == 144  # the state: three sequences of two heads
    assert timing.moved_bytes(op, itemsize=2, **SMALL) == sum(moved)
    assert timing.moved_bytes(op, itemsize=2, backward=True, **SMALL) == 3 * moved[0] + 2 * moved[1]


def test_products_are_counted_as_the_eager_kernel_makes_them():
    """Torch's own count of the matrix products in one whole chunk: its inverse is a solve, which it does not count."""
    from torch.utils.flop_counter import FlopCounterMode

    sizes = dict(HK=2, HV=4, K=32, V=48)
    inputs = registry.ops()["chunk_gdn"].make_inputs(B=1, T=64, **sizes)
    with FlopCounterMode(display=False) as counter:
        registry.get("chunk_gdn", "eager").fn(**inputs)
    dims = dict(batch=1, tokens=64, k_heads=2, v_heads=4, k_dim=32, v_dim=48)
    assert counter.get_total_flops() == timing.flops("chunk_gdn", **dims)


def test_moved_bytes_give_the_floors_that_were_measured_against():
    """An H200 copies 4.27 TB/s: a decode step of 32 heads, 128 x 128, cannot take less than 1.0 µs a sequence."""
    dims = dict(k_heads=16, v_heads=32, k_dim=128, v_dim=128, itemsize=2)
    for batch in (1, 256):
        floor = timing.moved_bytes("recurrent_gdn", batch=batch, tokens=1, **dims) / 4.27e12
        assert floor == pytest.approx(1e-6 * batch, rel=0.03)
    assert timing.moved_bytes("chunk_gdn", batch=1, tokens=8192, **dims) / 4.27e9 == pytest.approx(0.048, rel=0.02)


def test_ceilings_of_this_machine(monkeypatch):
    used = []

    def stub(run, seconds, device):
        run()
        used.append(seconds)
        return [20.0, 12.5]

    monkeypatch.setattr(timing, "timer", lambda device, gpu_graph=False: stub)
    found = timing.ceilings(torch.device("cpu"), torch.float16)
    assert found["copy_gb_s"] == pytest.approx(2 * 2**28 / 12.5e-3 / 1e9)
    assert found["matmul_tflop_s"] == pytest.approx(2 * 256**3 / 12.5e-3 / 1e12)  # 10 ms: no larger one is tried
    assert len(used) == 3


def test_timers():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert timing.timer(cpu) is timing.clocked and timing.timer(gpu) is timing.evented
    assert timing.timer(gpu, gpu_graph=True) is timing.repeated
    assert len(timing.samples(lambda: 1.0, 0.01)) == 10
    assert len(timing.samples(lambda: 1e3, 0.01)) == timing.FEWEST
    assert len(timing.samples(lambda: 1e-6, 1)) == timing.MOST


@pytest.fixture
def pretended(monkeypatch):
    """A CUDA device on which an eager call takes 3 ms and a replay 0.25 ms."""
    log = types.SimpleNamespace(now=0.0, captures=0, replays=0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = log.now

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        def replay(self):
            log.now += 0.25
            log.replays += 1

    @contextlib.contextmanager
    def capture(graph):
        log.captures += 1
        before = log.now
        yield
        log.now = before  # nothing runs while it is captured

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in (
        ("Event", Event), ("CUDAGraph", Graph), ("graph", capture), ("Stream", lambda device: stream),
        ("stream", lambda stream: contextlib.nullcontext()), ("current_stream", lambda device: stream),
        ("synchronize", lambda device: None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    return log


def test_graph_replays_are_timed_and_python_calls_are(pretended):
    calls = []

    def run():
        calls.append(1)
        pretended.now += 3
        return len(calls)

    device = torch.device("cuda")
    assert timing.evented(run, 0.03, device) == pytest.approx([3.0] * 10)
    calls.clear()
    replay = timing.captured(run, device)
    assert len(calls) == 4 and pretended.captures == 1 and pretended.replays == 0  # three to warm up, one captured
    assert replay() == 4 and pretended.replays == 1 and len(calls) == 4
    assert timing.repeated(replay, 0.01, device) == pytest.approx([0.25] * 10)
    assert pretended.replays == 1 + 2 + 4 * 11 and len(calls) == 4
