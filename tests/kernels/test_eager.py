"""The eager backend against the float64 oracle.

Budgets are relative Frobenius errors. fp32: every element is a sum of at most a few hundred products with relative
error 2^-24 each, worst case 1e-5; half types are computed in fp32 from rounded inputs, so only the final rounding of o
counts, 2^-11 (fp16) or 2^-8 (bf16), inside the operator's bars of 1e-3 and 1.6e-2.
"""

import pytest
import torch

from hf_gdn import registry
from hf_gdn.kernels.reference import delta_rule
from tests.tiny import assert_close, error

OPS = ["chunk_gdn", "recurrent_gdn", "chunk_kda", "recurrent_kda"]
BUDGET = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
SHAPES = {  # B, T, HK, HV, K, V
    "one_token": (2, 1, 2, 2, 8, 8),
    "two_tokens": (1, 2, 1, 2, 8, 16),
    "below_a_chunk": (1, 63, 2, 4, 8, 8),
    "a_chunk": (1, 64, 2, 2, 8, 8),
    "above_a_chunk": (2, 65, 1, 3, 8, 8),
    "odd_dims": (1, 100, 2, 4, 24, 40),
    "olmo_dims": (1, 70, 1, 1, 96, 192),
    "longer_than_a_slab": (1, 1000, 1, 2, 8, 8),
}


def exact(inputs):
    return delta_rule(
        **{n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in inputs.items()}
    )


def make(op, shape, dtype=torch.float32, **kwargs):
    B, T, HK, HV, K, V = SHAPES[shape]
    return registry.ops()[op].make_inputs(B=B, T=T, HK=HK, HV=HV, K=K, V=V, dtype=dtype, **kwargs)


def check(op, inputs, budget, **kwargs):
    got = registry.get(op, "eager").fn(**inputs, **kwargs)
    for name, x, y in zip(("o", "state"), got, exact(inputs)):
        assert_close(f"{op} {name}", x, y, budget)
    return got


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(op, shape):
    check(op, make(op, shape), BUDGET[torch.float32])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no_state"])
def test_dtypes(op, dtype, state):
    inputs = make(op, "odd_dims", dtype, state=state)
    o, final = check(op, inputs, BUDGET[dtype])
    assert o.dtype == dtype
    assert final.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", ["no_decay", "total_decay", "one_step_in_some_channels", "beta_two"])
def test_extremes(op, case):
    inputs = make(op, "odd_dims")
    g = inputs["g"]
    if case == "no_decay":
        inputs["g"] = torch.zeros_like(g)
    elif case == "total_decay":
        inputs["g"] = torch.full_like(g, -60.0)
    elif case == "one_step_in_some_channels":
        struck = torch.rand(g.shape, generator=torch.Generator().manual_seed(1)) < 0.05
        inputs["g"] = torch.where(struck, -60.0, g / 100)
    else:
        inputs["beta"] = 2 * inputs["beta"]
    check(op, inputs, BUDGET[torch.float32])


def test_no_decay_for_thousands_of_steps():
    inputs = registry.ops()["chunk_kda"].make_inputs(T=4096, HK=1, HV=1, K=8, V=8, decay=0.0)
    check("chunk_kda", inputs, BUDGET[torch.float32])


@pytest.mark.parametrize("op", OPS)
def test_l2norm_inside(op):
    inputs = make(op, "above_a_chunk")
    check(op, {**inputs, "q": 3 * inputs["q"], "k": 5 * inputs["k"], "qk_l2norm": True}, BUDGET[torch.float32])


@pytest.mark.parametrize("op", OPS)
def test_autocast_rounds_nothing(op):
    with torch.autocast("cpu", torch.bfloat16):
        check(op, make(op, "odd_dims"), BUDGET[torch.float32])


@pytest.mark.parametrize("op", OPS)
def test_split_is_whole(op):
    fn, inputs = registry.get(op, "eager").fn, make(op, "odd_dims")
    whole, final = fn(**inputs)
    for at in (1, 17, 64, 99):
        halves = [
            {n: x[:, s] if n in ("q", "k", "v", "g", "beta") else x for n, x in inputs.items()}
            for s in (slice(None, at), slice(at, None))
        ]
        first, state = fn(**halves[0])
        second, last = fn(**{**halves[1], "initial_state": state})
        assert error(torch.cat((first, second), 1), whole) < 1e-6
        assert error(last, final) < 1e-6


@pytest.mark.parametrize("op", OPS)
def test_packed_is_separate(op):
    bounds = [0, 30, 30, 31, 100]
    inputs = make(op, "odd_dims")
    state = torch.randn(4, *inputs["initial_state"].shape[1:])
    packed = {**inputs, "initial_state": state, "cu_seqlens": torch.tensor(bounds)}
    check(op, packed, BUDGET[torch.float32])


@pytest.mark.parametrize("op", OPS)
def test_empty(op):
    inputs = registry.ops()[op].make_inputs(T=0, HK=1, HV=2, K=4, V=4)
    o, state = registry.get(op, "eager").fn(**inputs)
    assert o.shape == (1, 0, 2, 4)
    assert torch.equal(state, inputs["initial_state"])
    assert state is not inputs["initial_state"]


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_left_alone_and_runs_agree(op):
    inputs = make(op, "odd_dims")
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, torch.Tensor)}
    first, second = (registry.get(op, "eager").fn(**inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))
    assert all(torch.equal(inputs[n], x) for n, x in before.items())


@pytest.mark.parametrize("op", ["recurrent_gdn", "recurrent_kda"])
def test_in_place_and_state_after_every_token(op):
    inputs = make(op, "two_tokens")
    fn = registry.get(op, "eager").fn
    o, final = fn(**inputs)
    state, states = inputs["initial_state"].clone(), torch.full((1, 2, 2, 8, 16), float("nan"))
    o2, same = fn(**{**inputs, "initial_state": state}, inplace=True, token_states=states)
    assert same is state
    assert torch.equal(o, o2) and torch.equal(state, final) and torch.equal(states[:, -1], final)
    one = {n: x[:, :1] if n in ("q", "k", "v", "g", "beta") else x for n, x in inputs.items()}
    assert error(states[:, 0], fn(**one)[1]) < 1e-6


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("tokens", "fast"), [(5, False), (70, True)], ids=["every_entry", "across_chunks"])
def test_gradients(op, tokens, fast):
    inputs = registry.ops()[op].make_inputs(T=tokens, HK=1, HV=2, K=3, V=2, dtype=torch.float64)
    names = [n for n, x in inputs.items() if isinstance(x, torch.Tensor)]
    tensors = [inputs[n].requires_grad_() for n in names]
    fn = registry.get(op, "eager").fn
    assert torch.autograd.gradcheck(
        lambda *x: fn(**{**inputs, **dict(zip(names, x)), "qk_l2norm": True}), tensors, fast_mode=fast
    )


def test_memory_is_linear_in_tokens():
    from hf_gdn.eval.timing import peak_bytes

    peaks = []
    for T in (1024, 4096):
        inputs = registry.ops()["chunk_kda"].make_inputs(T=T, HK=2, HV=2, K=32, V=32)
        with torch.no_grad():
            peaks.append(peak_bytes(lambda x=inputs: registry.get("chunk_kda", "eager").fn(**x), torch.device("cpu")))
    # Outputs grow with T, working memory does not: far below the [.., 64, 64, K] tensor of the plain form.
    assert peaks[1] < 4 * peaks[0]
    assert peaks[1] < 4096 * 2 * 32 * 4 * 16
