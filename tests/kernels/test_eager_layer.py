"""Prologue, norm and step in plain PyTorch against the float64 oracle, and their operators.

In fp32 a step is some thirty roundings of 2^-25 on average, and sums over K and V of up to 64 terms; 1e-5 is ten times
what they make together. The oracle shares nothing with it.
"""

import pytest
import torch

from hf_gdn import operators, registry
from hf_gdn.kernels import GATED_NORM, PROLOGUE_GDN, PROLOGUE_KDA, STEP_KDA, reference
from hf_gdn.kernels.contract import DeltaRuleInputs
from hf_gdn.kernels.eager.gated_norm import gated_norm
from hf_gdn.kernels.eager.prologue import prologue
from hf_gdn.kernels.eager.step import step
from tests.tiny import assert_close

from .steps import FAMILIES, double

BUDGET = 1e-5


@pytest.fixture(params=FAMILIES)
def inputs(request):
    op, spec = FAMILIES[request.param]
    return op.make_inputs(B=2, T=3, HK=4 if op is STEP_KDA else 2, HV=4, K=12, V=20, **spec)


def first(projected, tokens):
    return type(projected)(*(x if x is None else x[:, :tokens] for x in projected))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_the_eager_step_is_the_oracles(inputs, tokens, width):
    projected, weights, conv_state = first(inputs["projected"], tokens), inputs["weights"], inputs["conv_state"]
    weights = weights._replace(conv=torch.randn(weights.conv.shape[0], width), conv_bias=torch.randn(len(weights.conv)))
    conv_state = torch.randn(*conv_state.shape[:2], width)
    wanted = reference.step(
        double(projected), double(weights), inputs["spec"], conv_state.double(), inputs["state"].double()
    )
    state = inputs["state"].clone()
    y = step(projected, weights, inputs["spec"], conv_state, state)
    for name, got, want in zip(("y", "conv_state", "state"), (y, conv_state, state), wanted):
        assert_close(name, got, want, BUDGET)


def test_the_operator_passes_opcheck(inputs):
    op = "step_kda" if inputs["projected"].a.dim() == 3 else "step_gdn"
    tensors = *inputs["projected"][:6], *inputs["weights"], inputs["conv_state"], inputs["state"]
    tensors = [x if x is None else x.contiguous() for x in tensors]
    torch.library.opcheck(operators.STEP_OPERATORS[op], (*tensors, *inputs["spec"], "eager"))


def test_compiles_as_an_operator_without_a_break(inputs):
    """As a kernel that torch.compile cannot look into is called; in place."""
    op = "step_kda" if inputs["projected"].a.dim() == 3 else "step_gdn"
    kernel = registry.Kernel(op, "eager", step, lambda request: None)

    def function(projected, conv_state, state):
        return operators.call_step(kernel, projected, inputs["weights"], inputs["spec"], conv_state, state) + 1

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        conv_state, state = inputs["conv_state"].clone(), inputs["state"].clone()
        results.append((call(inputs["projected"], conv_state, state), conv_state, state))
    for name, got, want in zip(("y", "conv_state", "state"), *results):
        assert_close(name, got, want, 1e-6)


def test_few_tokens_at_once_or_one_by_one(inputs):
    whole, parts = [inputs[name].clone() for name in ("conv_state", "state")], []
    at_once = step(inputs["projected"], inputs["weights"], inputs["spec"], *whole)
    conv_state, state = inputs["conv_state"].clone(), inputs["state"].clone()
    for t in range(3):
        projected = type(inputs["projected"])(*(x if x is None else x[:, t : t + 1] for x in inputs["projected"]))
        parts.append(step(projected, inputs["weights"], inputs["spec"], conv_state, state))
    for name, got, want in zip(
        ("y", "conv_state", "state"), (torch.cat(parts, 1), conv_state, state), (at_once, *whole)
    ):
        assert_close(name, got, want, BUDGET)


# ------------------------------------------------------------------------------------------------- prologue and norm


@pytest.fixture(params=FAMILIES)
def call(request):
    """Arguments of a prologue."""
    op, spec = FAMILIES[request.param]
    op, heads = (PROLOGUE_KDA, 4) if op is STEP_KDA else (PROLOGUE_GDN, 2)
    return op.make_inputs(B=2, T=9, HK=heads, HV=4, K=12, V=20, bias=True, **spec)


def operator(call):
    kind = "kda" if call["projected"].a.dim() == 3 else "gdn"
    return f"prologue_{kind}"


@pytest.mark.parametrize("context", ["cache", "empty", "none", "padded", "packed"])
def test_the_eager_prologue_is_the_oracles(call, context):
    if context in ("empty", "none", "packed"):
        call["conv_state"] = None
    if context == "none":
        call["keep"] = 0
    if context == "padded":
        call["lengths"] = torch.tensor([9, 2])
    if context == "packed":
        call["projected"] = type(call["projected"])(*(x if x is None else x[:1] for x in call["projected"]))
        call["cu_seqlens"] = torch.tensor([0, 0, 2, 3, 9])
    exact = dict(call, projected=double(call["projected"]), weights=double(call["weights"]))
    exact["conv_state"] = None if call["conv_state"] is None else call["conv_state"].double()
    wanted = reference.prologue(**exact)
    for name, got, want in zip(DeltaRuleInputs._fields, prologue(**call), wanted, strict=True):
        if want is None:
            assert got is None
        else:
            assert_close(name, got, want, BUDGET)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_prologue_rounds_once(call, dtype):
    """q, k and v are within half a unit in the last place of what float32 gives, and the gates are float32."""
    projected, weights = (
        type(x)(*(y if y is None else y.to(dtype) for y in x)) for x in (call["projected"], call["weights"])
    )  # fmt: skip
    made = prologue(projected, weights, call["spec"])
    wanted = prologue(
        type(projected)(*(x if x is None else x.float() for x in projected)),
        weights,
        call["spec"]._replace(decay_in_dtype=False),
    )
    for name, got, want in zip("qkv", made, wanted):
        assert got.dtype == dtype and torch.equal(got, want.to(dtype)), name
    assert made.g.dtype == made.beta.dtype == torch.float32


def test_autocast_leaves_the_prologue_alone(call):
    plain = prologue(**call)
    with torch.autocast("cpu", torch.bfloat16):
        cast = prologue(**call)
    assert all(torch.equal(x, y) for x, y in zip(plain, cast))


@pytest.mark.parametrize("keep", [4, 0])
def test_the_prologues_operator(call, keep):
    projected = [x if x is None else x.contiguous() for x in call["projected"][:6]]
    conv_state = call["conv_state"] if keep else None
    given = (*projected, *call["weights"][:4], *call["spec"][:3], conv_state, keep, None, torch.tensor([9, 4]), "eager")
    torch.library.opcheck(operators.PROLOGUE_OPERATORS[operator(call)], given)


def test_prologue_and_norm_compile_as_operators_without_a_break(call):
    """As kernels that torch.compile cannot look into are called."""
    weights, spec = call["weights"], call["spec"]
    first = registry.Kernel(operator(call), "eager", prologue, lambda request: None)
    last = registry.Kernel("gated_norm", "eager", gated_norm, lambda request: None)

    def function(projected, conv_state):
        made = operators.call_prologue(
            first, projected, weights, spec, conv_state=conv_state, keep=4, cu_seqlens=None, lengths=None
        )
        return *made, operators.call_norm(last, made.v, projected.z, weights.norm, spec) + 1

    results = [
        f(call["projected"], call["conv_state"])
        for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager"))
    ]
    for name, got, want in zip((*DeltaRuleInputs._fields, "y"), *results, strict=True):
        assert_close(name, got, want, 1e-6)


def test_the_norms_operator(call):
    z, weight, spec = call["projected"].z.contiguous(), call["weights"].norm, call["spec"]
    o = torch.randn(2, 9, 4, 20)
    torch.library.opcheck(operators.NORM_OPERATOR, (o, z, weight, *spec[4:], "eager"))


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
@pytest.mark.parametrize("norm_in_fp32", [False, True])
def test_the_eager_norm_is_the_oracles(gate, norm_in_fp32):
    call = GATED_NORM.make_inputs(B=2, T=5, HK=2, HV=4, V=20, gate=gate, norm_in_fp32=norm_in_fp32)
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    assert_close("y", gated_norm(**call), reference.gated_norm(**exact), BUDGET)
