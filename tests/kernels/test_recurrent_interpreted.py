"""The recurrent Triton kernel against the float64 oracle, in Triton's interpreter.

Budgets are relative Frobenius errors against float64 on the same, already rounded inputs.
fp32: a step is a decay, a difference, two sums over K that are trees of depth 8, and an update, some 20 roundings of
2^-25 on average, 1.3e-7 if they are independent. With unit keys and beta in [0, 2] a step does not enlarge the error
of the state, so over T = 63 it grows like sqrt(T), to 1e-6; ten times that is allowed. The state is always fp32.
fp16, bf16: computed in fp32, so o is off by its last rounding, at most 2^-11 = 4.9e-4 and 2^-8 = 3.9e-3 of each
element; the operator's bars are 1e-3 and 1.6e-2.
"""

import pytest
import torch

from hf_gdn.kernels import RECURRENT_GDN, RECURRENT_KDA
from hf_gdn.kernels.reference import delta_rule
from hf_gdn.kernels.triton import recurrent as module
from hf_gdn.kernels.triton.recurrent import recurrent
from hf_gdn.kernels.triton.runtime import INTERPRET
from hf_gdn.kernels.triton.tokens import TOKEN_CONFIGS
from tests.tiny import assert_close

pytestmark = [pytest.mark.interpret, pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")]

BUDGET = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
SHAPES = {  # B, T, HK, HV, K, V
    "one_token": (2, 1, 2, 2, 16, 16),
    "two_tokens": (1, 2, 1, 2, 16, 8),
    "a_draft": (1, 16, 1, 2, 8, 32),
    "many_tokens": (1, 63, 1, 1, 8, 8),
    "odd_dims": (1, 3, 2, 4, 24, 40),
    "olmo_dims": (1, 2, 1, 1, 96, 192),
    "smallest_dims": (1, 3, 1, 3, 1, 1),
    "largest_dims": (1, 1, 1, 1, 256, 256),
}
PER_TOKEN = ("q", "k", "v", "g", "beta")


@pytest.fixture(params=[RECURRENT_GDN, RECURRENT_KDA], ids=["gdn", "kda"])
def op(request):
    return request.param


def make(op, shape, dtype=torch.float32, **kwargs):
    B, T, HK, HV, K, V = SHAPES.get(shape, shape)
    return op.make_inputs(B=B, T=T, HK=HK, HV=HV, K=K, V=V, dtype=dtype, **kwargs)


def exact(inputs):
    """The oracle's answer in float64."""
    floating = {n: x.double() for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return delta_rule(**{**inputs, **floating})


def check(inputs, **kwargs):
    """Run the kernel, compare it with the oracle within the budget of the inputs' dtype, return what it returned."""
    wanted = exact(inputs)
    got = recurrent(**inputs, **kwargs)
    assert got[0].dtype == inputs["v"].dtype
    assert got[1].dtype == torch.float32
    assert_close("o", got[0], wanted[0], BUDGET[inputs["v"].dtype])
    assert_close("state", got[1], wanted[1], BUDGET[torch.float32])
    return got


def tokens(inputs, part):
    """The same call on a slice of its tokens."""
    return {name: x[:, part] if name in PER_TOKEN else x for name, x in inputs.items()}


def assert_same(got, wanted):
    """Bit for bit."""
    for name, x, y in zip(("o", "state"), got, wanted, strict=True):
        assert torch.equal(x, y), f"{name} differs by up to {(x - y).abs().max().item():.2e}"


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(op, shape):
    check(make(op, shape))


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no_state"])
def test_dtypes(op, dtype, state):
    check(make(op, "odd_dims", dtype, state=state))


def test_beta_in_fp32_beside_bf16(op):
    inputs = make(op, "two_tokens", torch.bfloat16)
    check({**inputs, "beta": inputs["beta"].float() + 1e-4})


@pytest.mark.parametrize("case", ["no_decay", "total_decay", "far_beyond", "one_step", "minus_infinity"])
def test_extreme_gates(op, case):
    inputs = make(op, (1, 5, 1, 2, 8, 16))
    g = inputs["g"]
    if case == "one_step":
        g[:, 2] = -60.0
    elif case == "minus_infinity":
        g[:, 2, ..., 0] = -torch.inf
    else:
        g.fill_({"no_decay": 0.0, "total_decay": -60.0, "far_beyond": -1e4}[case])
    check(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_l2norm_inside(op, dtype):
    inputs = make(op, "odd_dims", dtype)
    inputs["k"][:, 1] = 0  # as of a padded token: stays 0
    check({**inputs, "q": 3 * inputs["q"], "k": 5 * inputs["k"], "qk_l2norm": True})


def test_in_place(op):
    inputs = make(op, "odd_dims")
    before = {name: inputs[name].clone() for name in PER_TOKEN}
    o, final = recurrent(**inputs)
    state = inputs["initial_state"].clone()
    o_inplace, same = check({**inputs, "initial_state": state}, inplace=True)
    assert same is state
    assert_same((o_inplace, same), (o, final))
    assert not torch.equal(inputs["initial_state"], state)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


def test_not_in_place_leaves_the_state_alone(op):
    inputs = make(op, "two_tokens")
    state = inputs["initial_state"].clone()
    _, final = recurrent(**inputs)
    assert final is not inputs["initial_state"]
    assert torch.equal(inputs["initial_state"], state)


def test_state_after_every_token(op):
    inputs = make(op, (2, 4, 1, 2, 8, 24))
    room = torch.full((2, 6, 2, 8, 24), torch.nan)  # as in a cache with room for more tokens
    states = room[:, 1:5]
    result = recurrent(**inputs, token_states=states)
    assert_same(result, recurrent(**inputs))
    for t in range(4):
        prefix = tokens(inputs, slice(t + 1))
        assert_close(f"state after token {t}", states[:, t], exact(prefix)[1], BUDGET[torch.float32])
        assert torch.equal(states[:, t], recurrent(**prefix)[1])
    assert room[:, 0].isnan().all() and room[:, 5].isnan().all()


def test_split_is_whole_bit_for_bit(op):
    inputs = {**make(op, (1, 6, 1, 2, 24, 16)), "qk_l2norm": True}
    o, final = recurrent(**inputs)
    state, parts = inputs["initial_state"].clone(), []
    for part in (slice(0, 1), slice(1, 2), slice(2, 6)):
        parts.append(recurrent(**{**tokens(inputs, part), "initial_state": state}, inplace=True)[0])
    assert_same((torch.cat(parts, 1), state), (o, final))


def test_batched_is_single_bit_for_bit(op):
    inputs = make(op, (3, 2, 1, 2, 24, 16))
    o, final = recurrent(**inputs)
    for b in range(3):
        one = {name: x[b : b + 1] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        assert_same(recurrent(**one), (o[b : b + 1], final[b : b + 1]))


@pytest.mark.parametrize("tile", [(config.BV, config.num_warps) for config in TOKEN_CONFIGS], ids=str)
def test_every_tile_gives_the_same_bits(op, tile, monkeypatch):
    inputs = {**make(op, (1, 2, 1, 1, 24, 80)), "qk_l2norm": True}
    result = recurrent(**inputs)
    monkeypatch.setattr(module, "tile_config", lambda *_: tile)
    assert_same(check(inputs), result)


def test_runs_agree(op):
    inputs = make(op, "odd_dims", torch.bfloat16)
    assert_same(recurrent(**inputs), recurrent(**inputs))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no_state"])
def test_packed_is_separate(op, dtype, state):
    bounds = [0, 3, 3, 4, 9]  # three tokens, none, one, five
    inputs = make(op, (1, 9, 1, 2, 8, 24))
    inputs["initial_state"] = torch.randn(4, 2, 8, 24) if state else None
    o, final = check({**inputs, "cu_seqlens": torch.tensor(bounds, dtype=dtype)})
    for n in range(4):
        part = slice(bounds[n], bounds[n + 1])
        alone = {**tokens(inputs, part), "initial_state": inputs["initial_state"][n : n + 1] if state else None}
        assert_same(recurrent(**alone), (o[:, part], final[n : n + 1]))


def strided(x):
    """x as a view into a larger tensor of NaN, heads outside tokens; the last dimension stays contiguous."""
    B, T, H, D = x.shape
    view = torch.full((B, H + 1, T + 2, D + 3), torch.nan, dtype=x.dtype)[:, 1:, 1:-1, :D].transpose(1, 2)
    return view.copy_(x)


def test_strided_inputs(op):
    inputs = make(op, (2, 3, 1, 2, 24, 40), torch.bfloat16)
    views = {name: strided(inputs[name]) for name in ("q", "k", "v")}
    # beta and a per-head gate are cut from the end of a wider projection.
    wide = torch.full((2, 3, 7), torch.nan, dtype=torch.bfloat16)
    views["beta"] = wide[..., 2:4].copy_(inputs["beta"])
    views["g"] = strided(inputs["g"]) if op is RECURRENT_KDA else wide.float()[..., 4:6].copy_(inputs["g"])
    views["initial_state"] = strided(inputs["initial_state"])
    assert not any(x.is_contiguous() for x in views.values())
    assert_same(check({**inputs, **views}), recurrent(**inputs))


@pytest.mark.parametrize(
    ("state", "inplace"), [(True, False), (True, True), (False, False)], ids=["state", "in_place", "no_state"]
)
def test_no_tokens(op, state, inplace):
    inputs = make(op, (2, 0, 1, 2, 8, 8), state=state)
    o, final = recurrent(**inputs, inplace=inplace)
    assert o.shape == (2, 0, 2, 8)
    assert torch.equal(final, inputs["initial_state"] if state else torch.zeros(2, 2, 8, 8))
    assert (final is inputs["initial_state"]) == inplace


def test_refuses_a_state_it_cannot_update(op):
    inputs = make(op, "two_tokens")
    for state, complaint in (
        (None, "it is None"),
        (inputs["initial_state"].mT.contiguous().mT, "contiguous float32 initial_state; it is float32 of shape"),
        (inputs["initial_state"].half(), "it is float16"),
    ):
        with pytest.raises(ValueError, match=complaint):
            recurrent(**{**inputs, "initial_state": state}, inplace=True)


def test_refuses_token_states_it_cannot_write(op):
    inputs = make(op, "two_tokens")
    states = torch.empty(1, 2, 2, 8, 16).mT
    with pytest.raises(ValueError, match=r"contiguous float32 \[K, V\] matrices; it is float32 of shape"):
        recurrent(**inputs, token_states=states)
