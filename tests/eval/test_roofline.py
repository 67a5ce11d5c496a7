"""Useful work by hand and by torch's own count, and the machine's ceilings."""

import pytest
import torch

from hf_gdn import registry
from hf_gdn.eval import roofline

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
    assert roofline.flops(op, **SMALL) == flops and roofline.flops(op, backward=True, **SMALL) == 3 * flops
    assert 3 * 2 * 4 * 2 * 3 == 144  # the state: three sequences of two heads
    assert roofline.moved_bytes(op, itemsize=2, **SMALL) == sum(moved)
    assert roofline.moved_bytes(op, itemsize=2, backward=True, **SMALL) == 3 * moved[0] + 2 * moved[1]


def test_products_are_counted_as_the_eager_kernel_makes_them():
    """Torch's own count of the matrix products in one whole chunk: its inverse is a solve, which it does not count."""
    from torch.utils.flop_counter import FlopCounterMode

    sizes = dict(HK=2, HV=4, K=32, V=48)
    inputs = registry.ops()["chunk_gdn"].make_inputs(B=1, T=64, **sizes)
    with FlopCounterMode(display=False) as counter:
        registry.get("chunk_gdn", "eager").fn(**inputs)
    dims = dict(batch=1, tokens=64, k_heads=2, v_heads=4, k_dim=32, v_dim=48)
    assert counter.get_total_flops() == roofline.flops("chunk_gdn", **dims)


def test_moved_bytes_give_the_floors_that_were_measured_against():
    """An H200 copies 4.27 TB/s: a decode step of 32 heads, 128 x 128, cannot take less than 1.0 µs a sequence."""
    dims = dict(k_heads=16, v_heads=32, k_dim=128, v_dim=128, itemsize=2)
    for batch in (1, 256):
        floor = roofline.moved_bytes("recurrent_gdn", batch=batch, tokens=1, **dims) / 4.27e12
        assert floor == pytest.approx(1e-6 * batch, rel=0.03)
    assert roofline.moved_bytes("chunk_gdn", batch=1, tokens=8192, **dims) / 4.27e9 == pytest.approx(0.048, rel=0.02)


def test_ceilings_of_this_machine(monkeypatch):
    used = []

    def stub(run, seconds, device):
        run()
        used.append(seconds)
        return [20.0, 12.5]

    monkeypatch.setattr(roofline, "times", stub)
    found = roofline.ceilings(torch.device("cpu"), torch.float16)
    assert found.copy_gb_s == pytest.approx(2 * 2**28 / 12.5e-3 / 1e9)
    assert found.matmul_tflop_s == pytest.approx(2 * 256**3 / 12.5e-3 / 1e12)  # 10 ms: no larger one is tried
    assert len(used) == 3
