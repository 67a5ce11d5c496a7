"""The scan in segments on a CUDA device, as the card's own table cuts: few heads, against the float64 oracle.

Bounds: test_chunk_interpreted.py derives them.
"""

from __future__ import annotations

import pytest
import torch

from hf_gdn.kernels.triton import segmented_scan

from .test_chunk_gpu import OPS, PER_TOKEN, both_ops, check, dtypes, error, make

pytestmark = pytest.mark.gpu


def few(op: str, HV: int = 2, decay: float = 0.01, **kwargs) -> dict:
    """So few heads that they are cut, and so little decay that what is before a segment matters in it."""
    assert segmented_scan.segment_count(HV, 128, torch.device("cuda")) > 1, "this card does not cut so many heads"
    return make(op, **{**dict(HK=1, HV=HV, decay=decay), **kwargs})


@both_ops
@dtypes
@pytest.mark.parametrize(("T", "HV"), [(4096, 1), (4097, 2), (6000, 4)])
def test_matches_oracle(op, dtype, T, HV):
    check(op, few(op, HV, T=T, dtype=dtype), tuple(range(HV)))


@both_ops
@dtypes
def test_error_like_uncut(op, dtype, monkeypatch):
    call = few(op, T=8192, dtype=dtype, decay=0.0)
    expected = OPS[op][0].reference(
        **{n: x.double() if n in (*PER_TOKEN, "initial_state") else x for n, x in call.items()}
    )
    cut = OPS[op][1](**call)
    monkeypatch.setattr(segmented_scan, "SEGMENTS_CONFIGS", ())
    for name, actual, x, e in zip(("o", "final_state"), cut, OPS[op][1](**call), expected, strict=True):
        # 1e-7: two ulp of fp32, since an error of zero cannot be doubled.
        assert error(actual, e) <= 2 * error(x, e) + 1e-7, f"{name}: {error(actual, e):.2e}, uncut {error(x, e):.2e}"


@both_ops
@dtypes
def test_packed_and_batched_equal_separate(op, dtype):
    lengths = [0, 1, 4095, 4500, 0, 64, 4096]
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    call = few(op, T=bounds[-1], dtype=dtype, state=False)
    states = few(op, B=len(lengths), T=1)["initial_state"]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")  # no length comes back to the host
    try:
        o, final = OPS[op][1](**dict(call, initial_state=states, cu_seqlens=cu_seqlens))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for n in range(len(lengths)):
        part = {x: call[x][:, bounds[n] : bounds[n + 1]] for x in PER_TOKEN}
        one = OPS[op][1](**dict(call, **part, initial_state=states[n : n + 1]))
        assert torch.equal(o[:, bounds[n] : bounds[n + 1]], one[0]), f"o of sequence {n}"
        assert torch.equal(final[n : n + 1], one[1]), f"final_state of sequence {n}"
    call = few(op, B=3, T=4200, dtype=dtype)
    result = OPS[op][1](**call)
    assert all(torch.equal(x, y) for x, y in zip(result, OPS[op][1](**call), strict=True))
    one = OPS[op][1](**{n: x[1:2] if isinstance(x, torch.Tensor) else x for n, x in call.items()})
    assert all(torch.equal(x[1:2], y) for x, y in zip(result, one, strict=True))


@both_ops
def test_captured_in_a_graph(op):
    """A replay serves other lengths than those of the capture."""
    call = few(op, T=9000, dtype=torch.bfloat16, state=False)
    bounds = torch.tensor([0, 4500, 9000], dtype=torch.int32, device="cuda")
    OPS[op][1](**dict(call, cu_seqlens=bounds))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OPS[op][1](**dict(call, cu_seqlens=bounds))
    bounds.copy_(torch.tensor([0, 100, 9000], dtype=torch.int32))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, OPS[op][1](**dict(call, cu_seqlens=bounds)), strict=True))
