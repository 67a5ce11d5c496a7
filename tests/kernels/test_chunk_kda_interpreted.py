"""chunk_kda in Triton's interpreter: chunks that go through one product, wider ones, and their neighbours.

Bounds are those of `test_chunk_interpreted`, which derives them. Run with TRITON_INTERPRET=1; no GPU is needed.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from hf_gdn.kernels.eager.chunk_kda import chunk_kda as eager
from hf_gdn.kernels.triton.runtime import INTERPRET

if not INTERPRET:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from hf_gdn.kernels.triton import chunk_kda as module
from hf_gdn.kernels.triton.chunk_kda_prepare import WIDEST

from .test_chunk_interpreted import BOUND, Shape, check, error, make, oracle, rounded_chunks

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.usefixtures("rounded_bf16"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
every_dtype = pytest.mark.parametrize("dtype", BOUND, ids=str)
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129]


def spread(shape: torch.Size, nats: float) -> torch.Tensor:
    """Gates ``[B, T, HV, K]`` of which every channel decays by `nats` from the first row of each chunk to the last."""
    g = -0.1 - torch.rand(shape, generator=torch.Generator().manual_seed(2))
    for first in range(0, shape[1], 64):
        rows = g[:, first + 1 : first + 64]
        rows *= -nats / rows.sum(1, keepdim=True)
    return g


@pytest.fixture
def ranges(monkeypatch):
    """Ranges ``[chunks, HV]`` of every call, by which the kernels decide how a chunk is served."""
    seen = []

    class Spy:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(**kwargs):
                seen.append(kwargs["p_range"])
                return self.kernel[grid](**kwargs)

            return run

    monkeypatch.setattr(module, "prepare_kernel", Spy(module.prepare_kernel))
    return seen


@every_dtype
@pytest.mark.parametrize("share", [0.5, 0.999, 1.001, 3.0])
def test_range_just_inside_and_just_outside(ranges, dtype, share):
    call = make("kda", Shape(T=128, K=48, HV=2, dtype=dtype))
    call["g"] = spread(call["g"].shape, share * WIDEST[dtype])
    check("kda", call)
    assert ((ranges[0] > -WIDEST[dtype]) == (share < 1)).all(), ranges[0]
    assert torch.allclose(ranges[0], torch.tensor(-share * WIDEST[dtype]), rtol=1e-5)


@every_dtype
def test_error_at_most_twice_plain_pytorch_at_the_widest(dtype):
    call = make("kda", Shape(T=130, HV=2, K=32, V=32, dtype=dtype))
    call["g"] = spread(call["g"].shape, 0.999 * WIDEST[dtype])
    expected = oracle("kda", call)
    plain = (eager if dtype == torch.float32 else rounded_chunks)(**call)
    for name, actual, x, e in zip(("o", "final_state"), module.chunk_kda(**call), plain, expected, strict=True):
        # 1e-7: two ulp of fp32, since an error of zero cannot be halved.
        assert error(actual, e) <= 2 * error(x, e) + 1e-7, f"{name}: {error(actual, e):.2e}, PyTorch {error(x, e):.2e}"


def both_kinds(dtype: torch.dtype, B: int = 1, K: int = 48) -> tuple[dict, torch.Tensor]:
    """A call of four chunks, the last one short, and two heads, and which ``[B * chunks, HV]`` of them are wide."""
    call = make("kda", Shape(B=B, T=212, HV=2, K=K, dtype=dtype))
    g = spread(call["g"].shape, 0.5 * WIDEST[dtype])
    g[0, 64 + 1 : 128, 0] *= 4  # a whole chunk of one head
    g[0, 192 + 9, 1, -1] = -2 * WIDEST[dtype]  # one channel of the last tile, in the short chunk
    g[0, 128 + 63, 1, 0] = -1e4  # one channel of the first tile, at the chunk's end
    wide = torch.zeros(B * 4, 2, dtype=torch.bool)
    wide[1, 0] = wide[2, 1] = wide[3, 1] = True
    return dict(call, g=g), wide


@every_dtype
@pytest.mark.parametrize("l2norm", [False, True], ids=["asis", "l2norm"])
def test_chunks_of_both_kinds_side_by_side(ranges, dtype, l2norm):
    call, wide = both_kinds(dtype)
    if l2norm:
        call["k"][:, 70] = 0  # a row that cannot be normalised
        call |= dict(q=5 * call["q"], k=7 * call["k"], qk_l2norm=True)
    check("kda", call)
    assert torch.equal(ranges[0] <= -WIDEST[dtype], wide)


def test_kind_of_a_chunk_does_not_depend_on_what_is_beside_it():
    """The same bits alone and in a batch, and a head alone and among others."""
    call, _ = both_kinds(torch.bfloat16, B=2)
    call["g"][1] = 3 * call["g"][1].flip(1)
    o, final = module.chunk_kda(**call)
    inputs = ("q", "k", "v", "g", "beta")
    for b in range(2):
        one = dict(call, **{n: call[n][b : b + 1] for n in (*inputs, "initial_state")})
        assert all(torch.equal(x, y[b : b + 1]) for x, y in zip(module.chunk_kda(**one), (o, final), strict=True))
    for h in range(2):
        one = dict(call, **{n: call[n][:, :, h : h + 1] for n in ("v", "g", "beta")})
        o_one, final_one = module.chunk_kda(**dict(one, initial_state=call["initial_state"][:, h : h + 1]))
        assert torch.equal(o_one, o[:, :, h : h + 1]) and torch.equal(final_one, final[:, h : h + 1])


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("share", [0.9, 1.1], ids=["narrow", "wide"])
def test_lengths(ranges, T, share):
    for dtype in (torch.float32, torch.bfloat16):
        call = make("kda", Shape(T=T, K=20, dtype=dtype))
        call["g"] = spread(call["g"].shape, share * WIDEST[dtype])
        check("kda", call)
        assert ((ranges[-1][0] > -WIDEST[dtype]) == (share < 1 or T == 1)).all()


@every_dtype
def test_packed_chunks_of_both_kinds(dtype):
    bounds = [0, 1, 66, 66, 83, 147, 212]
    call, _ = both_kinds(dtype, K=16)
    call["initial_state"] = None
    o, final = module.chunk_kda(**dict(call, cu_seqlens=torch.tensor(bounds)))
    for n in range(len(bounds) - 1):
        part = {x: call[x][:, bounds[n] : bounds[n + 1]] for x in ("q", "k", "v", "g", "beta")}
        o_part, final_part = module.chunk_kda(**dict(call, **part))
        assert torch.equal(o[:, bounds[n] : bounds[n + 1]], o_part), f"o of sequence {n}"
        assert torch.equal(final[n : n + 1], final_part), f"final_state of sequence {n}"
    check("kda", dict(call, cu_seqlens=torch.tensor(bounds)))


@every_dtype
@pytest.mark.parametrize("share", [0.999, 1.1], ids=["narrow", "wide"])
def test_large_queries_and_keys(dtype, share):
    """30 times as long, with beta so much smaller that the state does not grow: factors reach 30 e^60."""
    call = make("kda", Shape(T=130, K=32, dtype=dtype))
    call["g"] = spread(call["g"].shape, share * WIDEST[dtype])
    check("kda", dict(call, q=30 * call["q"], k=30 * call["k"], beta=call["beta"].float() / 900))


@every_dtype
@pytest.mark.parametrize("gate", [-200.0, -1e4, float("-inf")])
@pytest.mark.parametrize("row", [0, 1, 2, 37, 63])
def test_forgets_everything_at_one_row(ranges, dtype, gate, row):
    """What is before the row is gone, small decays around it count in full. At its first row the chunk stays narrow."""
    call = make("kda", Shape(T=130, K=20, dtype=dtype))
    call["g"] = spread(call["g"].shape, 0.5 * WIDEST[dtype])
    call["g"][:, 64 + row] = gate
    check("kda", call)
    assert (ranges[0] > -WIDEST[dtype]).flatten().tolist() == [True, row == 0, True]
