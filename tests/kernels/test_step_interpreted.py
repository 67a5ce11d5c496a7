"""The step kernels against the float64 oracle, in Triton's interpreter.

Budgets are relative Frobenius errors against float64 on the same, already rounded inputs. fp32: as for the recurrent
kernel, 1e-5 (tests/kernels/test_recurrent_interpreted.py), which the convolution, the gates and the norm add a few
roundings to. fp16, bf16: q, k and v, beta, o and, before the weight, the normed o are rounded to the model's dtype, as
transformers has it: with those of y itself and of o times the weight six roundings of 2^-11 or 2^-8 at most, each of a
third of that on average, and independent; the bars of 1e-3 and 1.6e-2 for a single operator hold for fp16's y times
two, for bf16's as they are.
"""

import itertools

import pytest
import torch

from hf_gdn.kernels import STEP_KDA, reference
from hf_gdn.kernels.triton import step as module
from hf_gdn.kernels.triton.math import softplus
from hf_gdn.kernels.triton.runtime import INTERPRET
from tests.tiny import assert_close

from .steps import FAMILIES, double

pytestmark = [pytest.mark.interpret, pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")]

BUDGET = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = {  # B, T, HK, HV, K, V, width
    "one_token": (2, 1, 2, 4, 16, 16, 4),
    "two_tokens": (1, 2, 1, 2, 16, 8, 4),
    "a_draft": (1, 16, 1, 2, 8, 32, 4),
    "as_many_as_the_window": (1, 4, 1, 1, 8, 8, 4),
    "odd_dims": (1, 3, 2, 4, 24, 40, 4),
    "olmo_dims": (1, 2, 1, 1, 96, 192, 4),
    "smallest_dims": (1, 3, 1, 3, 1, 1, 2),
    "no_convolution": (1, 2, 1, 2, 8, 8, 1),
    "width_3": (2, 2, 1, 2, 8, 8, 3),
    "width_8": (1, 3, 1, 2, 8, 8, 8),
}


def make(family, shape, **kwargs):
    op, spec = FAMILIES[family]
    B, T, HK, HV, K, V, width = SHAPES.get(shape, shape)
    if op is STEP_KDA:
        HK = HV
    return op.make_inputs(B=B, T=T, HK=HK, HV=HV, K=K, V=V, width=width, **{**spec, **kwargs})


def check(inputs):
    """Run the kernels, compare with the oracle, return y, conv_state and state."""
    projected, weights = double(inputs["projected"]), double(inputs["weights"])
    wanted = reference.step(projected, weights, inputs["spec"], inputs["conv_state"].double(), inputs["state"].double())
    conv_state, state = inputs["conv_state"].clone(), inputs["state"].clone()
    y = module.step(inputs["projected"], inputs["weights"], inputs["spec"], conv_state, state)
    assert y.dtype == inputs["projected"].q.dtype and conv_state.dtype == inputs["conv_state"].dtype
    budget = BUDGET[y.dtype]
    assert_close("y", y, wanted[0], budget)
    assert torch.equal(conv_state.double(), wanted[1]), "the conv_state holds other tokens"
    assert_close("state", state, wanted[2], budget)
    return y, conv_state, state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_shapes(family, shape):
    check(make(family, shape))


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_dtypes(family, dtype):
    check(make(family, "odd_dims", dtype=dtype))


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_bias(family):
    check(make(family, "odd_dims", bias=True))


@pytest.mark.parametrize("shift", [-100.0, -18.0, 25.0, 80.0])
@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear", "glm5_next"])
def test_extreme_gates(family, shift):
    """softplus of -18 is 1.5e-8, which log(1 + e^x) would lose; of 25 it is 25."""
    inputs = make(family, "two_tokens")
    projected, weights = (
        inputs["projected"],
        inputs["weights"]._replace(A_log=torch.zeros_like(inputs["weights"].A_log)),
    )
    check(
        {
            **inputs,
            "projected": projected._replace(a=projected.a + shift, b=projected.b + shift / 10),
            "weights": weights,
        }
    )


def test_small_decays_are_kept():
    """Over many tokens they add up: 1e-7 a token at A = 1 is what softplus(-16) makes."""
    x = torch.tensor([-30.0, -16.0, -8.0, -1.0, 0.0, 5.0, 19.9, 20.1, 90.0])

    import triton
    import triton.language as tl

    @triton.jit
    def kernel(p_x, p_y, N: tl.constexpr):
        o = tl.arange(0, N)
        tl.store(p_y + o, softplus(tl.load(p_x + o)))

    x = torch.cat([x, x[:7]])
    y = torch.empty_like(x)
    kernel[(1,)](x, y, N=16)
    assert torch.allclose(y.double(), torch.nn.functional.softplus(x.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_split_anywhere_is_the_whole_to_the_bit(family):
    inputs = make(family, (1, 7, 1, 2, 8, 16, 4), dtype=torch.bfloat16)
    whole = check(inputs)
    for cuts in ([1] * 7, [3, 4], [5, 1, 1]):
        conv_state, state, parts, start = inputs["conv_state"].clone(), inputs["state"].clone(), [], 0
        for size in cuts:
            part = type(inputs["projected"])(
                *(x if x is None else x[:, start : start + size] for x in inputs["projected"])
            )
            parts.append(module.step(part, inputs["weights"], inputs["spec"], conv_state, state))
            start += size
        for name, got, wanted in zip(("y", "conv_state", "state"), (torch.cat(parts, 1), conv_state, state), whole):
            assert torch.equal(got, wanted), f"{cuts}: {name}"


def test_bits_do_not_depend_on_the_tile(monkeypatch):
    inputs = make("qwen3_next", (3, 2, 1, 2, 16, 32, 4))
    results = []
    for options in [(8, 1), (16, 2), (32, 4)]:
        monkeypatch.setattr(module, "tile_config", lambda *_, options=options: options)
        results.append(check(inputs))
    for one, other in itertools.pairwise(results):
        assert all(torch.equal(x, y) for x, y in zip(one, other))


def test_rows_are_independent():
    inputs = make("qwen3_next", (3, 2, 1, 2, 8, 8, 4))
    whole = check(inputs)
    for row in range(3):
        projected = type(inputs["projected"])(*(x if x is None else x[row : row + 1] for x in inputs["projected"]))
        alone = check(
            {
                **inputs,
                "projected": projected,
                **{name: inputs[name][row : row + 1] for name in ("conv_state", "state")},
            }
        )
        assert all(torch.equal(x, y[row : row + 1]) for x, y in zip(alone, whole))


def test_separate_projections():
    """Layouts with tensors of their own instead of one interleaved."""
    inputs = make("qwen3_next", "odd_dims")
    apart = type(inputs["projected"])(
        *(None if x is None else x.clone(memory_format=torch.contiguous_format) for x in inputs["projected"])
    )
    for x, y in zip(check(inputs), check({**inputs, "projected": apart})):
        assert torch.equal(x, y)
