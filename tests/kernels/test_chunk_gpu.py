"""The chunk kernels on a CUDA device at real shapes, against the float64 oracle on a few of the heads.

Bounds: test_chunk_interpreted.py derives them. `-k` a head count or dtype picks a part.
"""

from __future__ import annotations

import pytest
import torch

from hf_gdn import kernels, registry
from hf_gdn.kernels.triton.chunk_gdn import chunk_gdn
from hf_gdn.kernels.triton.chunk_kda import chunk_kda
from hf_gdn.kernels.triton.chunk_kda_prepare import WIDEST

pytestmark = pytest.mark.gpu

BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
OPS = {"gdn": (kernels.CHUNK_GDN, chunk_gdn, 16, 32), "kda": (kernels.CHUNK_KDA, chunk_kda, 32, 32)}
PER_TOKEN = ("q", "k", "v", "g", "beta")
both_ops = pytest.mark.parametrize("op", OPS)
dtypes = pytest.mark.parametrize("dtype", BOUND, ids=str)


def make(op: str, **kwargs) -> dict:
    _, _, HK, HV = OPS[op]
    return OPS[op][0].make_inputs(**{**dict(HK=HK, HV=HV, K=128, V=128, device="cuda"), **kwargs})


def heads(call: dict, picked: list[int]) -> dict:
    """The call in float64 with `picked` value heads only, each with a key head of its own."""
    group = call["v"].shape[2] // call["k"].shape[2]
    keys = [h // group for h in picked]
    part = {n: call[n][:, :, keys if n in ("q", "k") else picked].double() for n in PER_TOKEN}
    state = call["initial_state"]
    return dict(call, **part, initial_state=None if state is None else state[:, picked].double())


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check(op: str, call: dict, picked: tuple[int, ...] = (0, 13, 31)) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel and hold some heads of it against the oracle."""
    fn, bound = OPS[op][1], BOUND[call["v"].dtype]
    result = fn(**call)
    picked = [h for h in picked if h < call["v"].shape[2]]
    expected = OPS[op][0].reference(**heads(call, picked))
    for name, a in zip(("o", "final_state"), result, strict=True):
        assert torch.isfinite(a).all(), f"{name}: {int((~torch.isfinite(a)).sum())} of {a.numel()} values not finite"
    for name, a, e in zip(("o", "final_state"), (result[0][:, :, picked], result[1][:, picked]), expected, strict=True):
        assert error(a, e) <= bound, f"{name}: relative error {error(a, e):.2e}, budget {bound:.2e}"
    return result


@both_ops
@dtypes
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 63), (1, 512), (1, 1000), (1, 2048), (8, 512)])
def test_matches_oracle(op, dtype, B, T):
    check(op, make(op, B=B, T=T, dtype=dtype))


@both_ops
@pytest.mark.parametrize(("K", "V"), [(64, 64), (96, 192), (256, 256), (20, 36)])
@dtypes
def test_other_head_sizes(op, dtype, K, V):
    check(op, make(op, T=200, HK=2, HV=4, K=K, V=V, dtype=dtype))


@both_ops
def test_wide_scan(op):
    """Enough heads for the other row of the launch table."""
    check(op, make(op, B=8, T=1000, dtype=torch.bfloat16, state=False))


@both_ops
@dtypes
def test_l2norm(op, dtype):
    call = make(op, T=200, dtype=dtype)
    check(op, dict(call, q=call["q"] * 7, k=call["k"] * 5, qk_l2norm=True))


@both_ops
@dtypes
@pytest.mark.parametrize("decay", [0.0, 0.4, 4.0, 12.0, 60.0])
def test_decay(op, dtype, decay):
    """From none to forgetting everything; for KDA also whatever way the blocks on the diagonal go."""
    check(op, make(op, T=512, dtype=dtype, decay=decay))


@dtypes
@pytest.mark.parametrize("share", [0.5, 0.999, 1.001])
def test_kda_chunks_of_both_kinds(dtype, share):
    """Every channel of a chunk decays by a share of what one product holds, in every third head by thrice that."""
    call = make("kda", T=1000, dtype=dtype, decay=1.0)
    for first in range(0, 1000, 64):
        rows = call["g"][:, first + 1 : first + 64]
        rows *= -share * WIDEST[dtype] / rows.sum(1, keepdim=True)
    call["g"][:, :, ::3] *= 3
    check("kda", call, picked=(0, 13, 30))


@both_ops
@dtypes
def test_complete_forgetting_at_single_steps(op, dtype):
    call = make(op, T=2048, dtype=dtype)
    random = torch.Generator("cuda").manual_seed(1)
    steps = torch.rand(call["g"].shape, generator=random, device="cuda") < 0.01
    check(op, dict(call, g=torch.where(steps, -60.0, 0.0)))
    check(op, dict(call, g=torch.where(steps, -60.0, 0.05 * call["g"])))
    check(op, dict(call, g=torch.full_like(call["g"], -60.0)))


@both_ops
@dtypes
def test_beta_up_to_two(op, dtype):
    call = make(op, T=512, dtype=dtype)
    check(op, dict(call, beta=2 * call["beta"]))


@both_ops
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_packed_equals_separate(op, dtype):
    bounds = [0, 0, 1, 65, 65, 577, 1000, 1000]
    call = make(op, T=1000, dtype=dtype, state=False)
    states = make(op, B=len(bounds) - 1, T=1)["initial_state"]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")  # no length comes back to the host
    try:
        o, final = OPS[op][1](**dict(call, initial_state=states, cu_seqlens=cu_seqlens))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for n in range(len(bounds) - 1):
        part = {x: call[x][:, bounds[n] : bounds[n + 1]] for x in PER_TOKEN}
        one = OPS[op][1](**dict(call, **part, initial_state=states[n : n + 1]))
        # A tile of another width may add up in another order: rounding of the dtype, not bits.
        for name, a, e in zip(("o", "state"), (o[:, bounds[n] : bounds[n + 1]], final[n : n + 1]), one, strict=True):
            assert torch.isfinite(a).all(), f"{name} of sequence {n}"
            assert a.numel() == 0 or error(a, e.double()) <= BOUND[dtype], f"{name} of sequence {n}"


@both_ops
def test_many_sequences(op):
    """More sequences than grid axes y and z take programs."""
    N = 3000
    call = make(op, T=N, HK=4, HV=32, K=32, V=32, dtype=torch.bfloat16, state=False)
    packed = OPS[op][1](**dict(call, cu_seqlens=torch.arange(N + 1, device="cuda")))
    rows = {x: call[x].transpose(0, 1) for x in PER_TOKEN}
    batched = OPS[op][1](**dict(call, **rows))
    assert error(packed[0], batched[0].transpose(0, 1).double()) <= BOUND[torch.bfloat16]
    assert error(packed[1], batched[1].double()) <= BOUND[torch.bfloat16]


@both_ops
@dtypes
def test_same_bits_every_run(op, dtype):
    call = make(op, T=1000, dtype=dtype)
    first = OPS[op][1](**call)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(OPS[op][1](**call), first, strict=True))


@both_ops
@pytest.mark.parametrize("at", [1, 64, 100, 511])
def test_split_equals_whole(op, at):
    call = make(op, T=512, dtype=torch.float32)
    whole = OPS[op][1](**call)
    o_first, carried = OPS[op][1](**dict(call, **{n: call[n][:, :at] for n in PER_TOKEN}))
    o_rest, final = OPS[op][1](**dict(call, **{n: call[n][:, at:] for n in PER_TOKEN}, initial_state=carried))
    assert error(torch.cat((o_first, o_rest), 1), whole[0].double()) <= BOUND[torch.float32]
    assert error(final, whole[1].double()) <= BOUND[torch.float32]


@both_ops
def test_strided_inputs(op):
    call = make(op, B=2, T=200, dtype=torch.bfloat16)
    expected = OPS[op][1](**call)
    moved = {n: call[n].transpose(1, 2).contiguous().transpose(1, 2) for n in PER_TOKEN}
    assert all(torch.equal(a, b) for a, b in zip(OPS[op][1](**dict(call, **moved)), expected, strict=True))


@both_ops
def test_fp32_close_to_plain_pytorch(op):
    call = make(op, T=512)
    expected = OPS[op][0].reference(**heads(call, [0, 31]))
    kernel, plain = (fn(**call)[0][:, :, [0, 31]] for fn in (OPS[op][1], registry.get(OPS[op][0].name, "eager").fn))
    # 1e-7: two ulp of fp32, since an error of zero cannot be halved.
    assert error(kernel, expected[0]) <= 2 * error(plain, expected[0]) + 1e-7
