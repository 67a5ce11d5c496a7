"""The chunk kernels in Triton's interpreter, against the float64 oracle. Run with TRITON_INTERPRET=1; no GPU is needed.
Uninitialised memory is NaN here (tests/conftest.py), so that a value read before it was written shows.

Bounds on the relative error (Frobenius norm of the difference over that of the oracle's result, inputs rounded to the
dtype before the oracle sees them): a bf16 operand carries a relative rounding error of at most 2^-9, an fp16 operand
2^-12 of its range, fp32 2^-24. A value passes about four roundings on its way (state, u, A or P, output), whose errors
are independent: 2 * 2^-9 = 4e-3, 2 * 2^-12 = 5e-4 and 2 * 2^-24 = 1.2e-7. The operator's bar leaves four times that in
bf16 and twice that in fp16. fp32 sums of 64 to 128 terms and exponents of up to 120 add about 100 ulp: 1e-5.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")
from hf_gdn import kernels, registry
from hf_gdn.kernels.triton.runtime import INTERPRET

if not INTERPRET:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from hf_gdn.kernels.triton.chunk_gdn import chunk_gdn
from hf_gdn.kernels.triton.chunk_kda import chunk_kda

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.usefixtures("rounded_bf16"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
OPS = {"gdn": (kernels.CHUNK_GDN, chunk_gdn), "kda": (kernels.CHUNK_KDA, chunk_kda)}
both_ops = pytest.mark.parametrize("op", OPS)


@dataclass(frozen=True)
class Shape:
    B: int = 1
    T: int = 65
    HK: int = 1
    HV: int = 1
    K: int = 16
    V: int = 16
    dtype: torch.dtype = torch.float32
    state: bool = True

    def __str__(self) -> str:
        heads = f"{self.HK}x{self.HV}heads-{self.K}x{self.V}"
        return f"{self.B}x{self.T}-{heads}-{str(self.dtype).removeprefix('torch.')}{'' if self.state else '-nostate'}"


SHAPES = [
    Shape(T=0),
    Shape(T=1),
    Shape(T=63, state=False),
    Shape(T=64),
    Shape(T=65, B=2),
    Shape(T=66, HK=2, HV=4),
    Shape(T=130),
    Shape(T=1000, state=False),
    Shape(T=70, K=96, V=192),
    Shape(T=66, K=20, V=36, HV=2),
    Shape(T=130, K=32, V=32, HV=2, dtype=torch.float16),
    Shape(T=130, K=32, V=32, HV=2, dtype=torch.bfloat16),
    Shape(T=65, K=128, V=16, dtype=torch.float16, state=False),
    Shape(T=65, K=128, V=16, dtype=torch.bfloat16, state=False),
    Shape(T=5, K=256, V=256, dtype=torch.bfloat16),
]


def make(op: str, shape: Shape, **kwargs) -> dict:
    return OPS[op][0].make_inputs(**{**vars(shape), **kwargs})


def oracle(op: str, call: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return OPS[op][0].reference(**{n: x.double() if n in _FLOATS and x is not None else x for n, x in call.items()})


_FLOATS = ("q", "k", "v", "g", "beta", "initial_state")


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.double() - expected.double()).norm().item()
    return difference / expected.double().norm().item() if difference else 0.0


def compare(actual, expected, bound: float, names=("o", "final_state")) -> None:
    for name, a, e in zip(names, actual, expected, strict=True):
        assert a.shape == e.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        assert torch.isfinite(a).all(), f"{name}: {int((~torch.isfinite(a)).sum())} of {a.numel()} values not finite"
        assert error(a, e) <= bound, f"{name}: relative error {error(a, e):.2e}, budget {bound:.2e}"


def check(op: str, call: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel and hold it against the oracle."""
    result = OPS[op][1](**call)
    assert result[0].dtype == call["v"].dtype and result[1].dtype == torch.float32 and result[1].is_contiguous()
    compare(result, oracle(op, call), BOUND[call["v"].dtype])
    return result


@both_ops
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(op, shape):
    check(op, make(op, shape))


def rounded_chunks(q, k, v, g, beta, *, scale, initial_state=None, cu_seqlens=None, qk_l2norm=False):
    """The kernels' chunk computation for one sequence in plain PyTorch, products in the inputs' dtype and fp32 else."""
    dtype = v.dtype

    def product(x, y):
        return x.to(dtype).float() @ y.to(dtype).float()

    group = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(group, 2) for x in (q, k))
    q, k, values, g, beta = (x.transpose(1, 2).float() for x in (q, k, v, g, beta))
    g = g if g.dim() == 4 else g[..., None]
    state, outputs = initial_state, []
    for first in range(0, v.shape[1], 64):
        part = slice(first, min(first + 64, v.shape[1]))
        q_c, k_c, v_c, beta_c, sums = (x[:, :, part] for x in (q, k, values, beta, g))
        sums = sums.double().cumsum(2)
        gap = (sums[:, :, :, None] - sums[:, :, None]).float().masked_fill(
            torch.ones(v_c.shape[2], v_c.shape[2]).triu(1).bool()[..., None], float("-inf")
        )  # fmt: skip
        kk, qk = (torch.einsum("bhid,bhjd,bhijd->bhij", x, k_c, gap.exp().expand(*gap.shape[:-1], k.shape[-1]))
                  for x in (k_c, q_c))  # fmt: skip
        a = torch.linalg.solve_triangular(
            kk * beta_c[..., None], torch.diag_embed(beta_c), upper=False, unitriangular=True
        )
        begin, finish = sums.exp().float(), (sums[:, :, -1:] - sums).exp().float()
        u = product(a, v_c - product(k_c * begin, state))
        outputs.append(scale * (product(q_c * begin, state) + product(qk, u)))
        state = state * begin[:, :, -1, :, None] + product((k_c * finish).transpose(-1, -2), u)
    return torch.cat(outputs, 2).transpose(1, 2).to(dtype), state


@both_ops
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_error_at_most_twice_plain_pytorch(op, dtype):
    call = make(op, Shape(T=130, HV=2, K=32, V=32, dtype=dtype))
    expected = oracle(op, call)
    eager = registry.get(OPS[op][0].name, "eager").fn
    plain = (eager if dtype == torch.float32 else rounded_chunks)(**call)
    for name, actual, x, e in zip(("o", "final_state"), OPS[op][1](**call), plain, expected, strict=True):
        # 1e-7: two ulp of fp32, since an error of zero cannot be halved.
        assert error(actual, e) <= 2 * error(x, e) + 1e-7, f"{name}: {error(actual, e):.2e}, PyTorch {error(x, e):.2e}"


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_l2norm(op, dtype):
    call = make(op, Shape(T=66, HK=2, HV=4, K=20, dtype=dtype))
    call["k"][:, 3] = 0  # a row that cannot be normalised
    check(op, dict(call, q=call["q"] * 7, k=call["k"] * 5, qk_l2norm=True))


@both_ops
def test_beta_up_to_two(op):
    call = make(op, Shape(T=130, K=32))
    check(op, dict(call, beta=2 * call["beta"]))


@both_ops
def test_equal_keys(op):
    """The worst case of the inverse: every row of it depends on all before."""
    call = make(op, Shape(T=128))
    call["k"][:] = call["k"][:, :1].clone()
    check(op, dict(call, g=0.01 * call["g"], beta=torch.ones_like(call["beta"])))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["equal", "similar"])
@both_ops
def test_inverse_rounds_no_more_than_pytorch(op, noise, beta, dtype):
    """Keys that resemble each other multiply every rounding inside the inverse; plain PyTorch solves in fp32."""
    call = make(op, Shape(T=130, HV=2, K=32, V=32, dtype=dtype))
    k = torch.nn.functional.normalize(noise * call["k"].double() + call["k"][:, :1].double(), dim=-1)
    call |= dict(k=k.to(dtype), g=0.1 * call["g"], beta=torch.full_like(call["beta"], beta))
    expected = oracle(op, call)
    eager = registry.get(OPS[op][0].name, "eager").fn
    plain = (eager if dtype == torch.float32 else rounded_chunks)(**call)
    for name, actual, x, e in zip(("o", "final_state"), OPS[op][1](**call), plain, expected, strict=True):
        assert error(actual, e) <= 2 * error(x, e) + 1e-7, f"{name}: {error(actual, e):.2e}, PyTorch {error(x, e):.2e}"


@pytest.mark.parametrize(("size", "beta", "decay"), [(50.0, 4e-4, 0.1), (0.01, 1.0, 0.1), (2.0, 1.0, 4.0)])
@both_ops
def test_keys_of_any_size(op, size, beta, decay):
    """Large keys with small beta, small keys, and a rule that grows but for its gate."""
    call = make(op, Shape(T=130, HV=2, K=32, V=32, dtype=torch.bfloat16), decay=2 * decay)
    check(op, dict(call, k=call["k"] * size, beta=call["beta"] * beta))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_value_heads_of_a_key_head(group, dtype):
    check("gdn", make("gdn", Shape(T=66, HK=2, HV=2 * group, dtype=dtype)))


def gate_none(g, random):
    return torch.zeros_like(g)


def gate_steps(g, random):
    """Complete forgetting at single steps, in single channels for KDA, amid none at all."""
    return torch.where(torch.rand(g.shape, generator=random) < 0.03, -60.0, 0.0)


def gate_mixed(g, random):
    """Single -60 amid small decays, and one channel that forgets everything at every step."""
    mixed = torch.where(torch.rand(g.shape, generator=random) < 0.03, -60.0, 0.05 * g)
    mixed[..., 0] = -60.0
    return mixed


def gate_all(g, random):
    return torch.full_like(g, -60.0)


def gate_average(nats: float):
    gate = functools.partial(lambda g, random: -2 * nats * torch.rand(g.shape, generator=random))
    gate.__name__ = f"average_{nats}"
    return gate


GATES = [gate_none, gate_steps, gate_mixed, gate_all, gate_average(0.2), gate_average(2.0), gate_average(6.0)]


@both_ops
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.__name__)
def test_gates(op, gate, dtype):
    call = make(op, Shape(T=80, HV=2, K=16, dtype=dtype))
    check(op, dict(call, g=gate(call["g"], torch.Generator().manual_seed(1))))


def test_small_decay_after_large_sum():
    """A channel that has decayed by thousands keeps the small decays that follow."""
    call = make("kda", Shape(T=192, K=16))
    call["g"] *= 0.01
    call["g"][:, :48:5] = -400.0
    call["g"][:, 64:70] = -1000.0
    check("kda", call)
    check("gdn", dict(make("gdn", Shape(T=192)), g=call["g"][..., 0].contiguous()))


BOUNDARIES = [
    pytest.param([0, 0, 1, 1, 65, 66, 130, 130], id="empty-and-single"),
    pytest.param([0, 64, 128], id="whole-chunks"),
    pytest.param([0, 0], id="nothing"),
]


@both_ops
@pytest.mark.parametrize("bounds", BOUNDARIES)
@pytest.mark.parametrize("state", [True, False], ids=["state", "nostate"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_packed_equals_separate(op, bounds, state, index):
    N = len(bounds) - 1
    call = make(op, Shape(T=bounds[-1], HK=1, HV=2, state=False))
    states = make(op, Shape(T=1, B=N, HV=2))["initial_state"] if state else None
    packed = OPS[op][1](**dict(call, initial_state=states, cu_seqlens=torch.tensor(bounds, dtype=index)))
    for n in range(N):
        part = {x: call[x][:, bounds[n] : bounds[n + 1]] for x in ("q", "k", "v", "g", "beta")}
        o, final = OPS[op][1](**dict(call, **part, initial_state=states[n : n + 1] if state else None))
        assert torch.equal(packed[0][:, bounds[n] : bounds[n + 1]], o), f"o of sequence {n}"
        assert torch.equal(packed[1][n : n + 1], final), f"final_state of sequence {n}"


def test_packed_never_asks_the_device(monkeypatch):
    def refuse(*args):
        raise AssertionError("reads a tensor's values on the host")

    for op, (_, fn) in OPS.items():
        call = dict(make(op, Shape(T=70, state=False)), cu_seqlens=torch.tensor([0, 1, 70]))
        with monkeypatch.context() as patch:
            for name in ("tolist", "item", "__int__", "__index__", "__bool__"):
                patch.setattr(torch.Tensor, name, refuse)
            fn(**call)


@both_ops
def test_batched_equals_single(op):
    call = make(op, Shape(B=2, T=66, HV=2))
    o, final = OPS[op][1](**call)
    for b in range(2):
        one = {n: x[b : b + 1] if isinstance(x, torch.Tensor) else x for n, x in call.items()}
        assert all(torch.equal(x, y) for x, y in zip((o[b : b + 1], final[b : b + 1]), OPS[op][1](**one), strict=True))


@both_ops
@pytest.mark.parametrize("at", [1, 64, 77, 129])
def test_split_anywhere_equals_whole(op, at):
    call = make(op, Shape(T=130, K=32))
    whole = OPS[op][1](**call)
    first, rest = (
        {n: x[:, part] if n in ("q", "k", "v", "g", "beta") else x for n, x in call.items()}
        for part in (slice(0, at), slice(at, None))
    )
    o_first, carried = OPS[op][1](**first)
    o_rest, final = OPS[op][1](**dict(rest, initial_state=carried))
    compare((torch.cat((o_first, o_rest), 1), final), whole, BOUND[torch.float32])


@both_ops
def test_strided_inputs(op):
    """Slices of one projection, heads and tokens swapped, a transposed state: outer strides only, same bits."""
    call = make(op, Shape(B=2, T=66, HK=2, HV=2, K=16, V=16))
    expected = OPS[op][1](**call)
    names = ("q", "k", "v")
    fused = torch.cat([call[n] for n in names], -1).transpose(1, 2).contiguous().transpose(1, 2)
    strided = {n: fused[..., 16 * i : 16 * i + 16] for i, n in enumerate(names)}
    for n in ("g", "beta"):
        strided[n] = torch.stack((call[n], call[n] * float("nan")), 2)[:, :, 0]
    strided["initial_state"] = call["initial_state"].transpose(2, 3).contiguous().transpose(2, 3)
    actual = OPS[op][1](**dict(call, **strided))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@both_ops
def test_same_bits_and_inputs_untouched(op):
    call = make(op, Shape(T=66, HV=2, K=32))
    before = {n: x.clone() for n, x in call.items() if isinstance(x, torch.Tensor)}
    first, second = OPS[op][1](**call), OPS[op][1](**call)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(call[n], x) for n, x in before.items())
