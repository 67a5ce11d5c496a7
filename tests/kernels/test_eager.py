"""The eager backend and the operators: gradients, autocast, rounding, memory, opcheck, torch.compile.

Its results are checked in tests/kernels/test_cases.py.
"""

from __future__ import annotations

import pytest
import torch

from hf_gdn import operators, registry
from hf_gdn.kernels.contract import DeltaRuleInputs
from hf_gdn.testing import assert_close, assert_same
from hf_gdn.testing import invariants as holds
from hf_gdn.testing.call_changes import equal_keys_beta_two
from hf_gdn.testing.calls import mapped
from hf_gdn.testing.case import FAMILIES, HALF
from hf_gdn.testing.tolerances import SAME_SUMS

DELTA_RULES = ("chunk_gdn", "recurrent_gdn", "chunk_kda", "recurrent_kda")
every_rule = pytest.mark.parametrize("op", DELTA_RULES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def eager(op):
    return registry.get(op, "eager")


def opaque(op):
    """The eager kernel as one that torch.compile cannot look into."""
    return registry.Kernel(op, "eager", eager(op).fn, lambda request: None)


def layer_call(kind, family, **sizes):
    """Op and arguments of a family's step or prologue."""
    variant, spec = FAMILIES[family]
    sizes = {"B": 2, "HK": 4 if variant == "kda" else 2, "HV": 4, "K": 12, "V": 20, **sizes, **spec}
    return f"{kind}_{variant}", registry.ops()[f"{kind}_{variant}"].make_inputs(**sizes)


# --------------------------------------------------------------------------------------------------------- delta rule


@pytest.mark.parametrize("op", ["backward_gdn", "backward_kda"])
def test_an_ill_conditioned_chunk_keeps_the_bar(op):
    """It is solved in float64."""
    call = equal_keys_beta_two(registry.ops()[op].make_inputs(HK=1, HV=1, K=16, V=16, T=128))
    holds.matches_reference(eager(op), call)


@every_rule
def test_autocast_rounds_nothing_in_the_delta_rule(op):
    call = registry.ops()[op].make_inputs(T=100, HK=2, HV=4, K=24, V=40)
    with torch.autocast("cpu", torch.bfloat16):
        holds.matches_reference(eager(op), call)


@every_rule
@pytest.mark.parametrize(("tokens", "fast"), [(5, False), (70, True)], ids=["every_entry", "across_chunks"])
def test_gradients(op, tokens, fast):
    inputs = registry.ops()[op].make_inputs(T=tokens, HK=1, HV=2, K=3, V=2, dtype=torch.float64)
    names = [n for n, x in inputs.items() if isinstance(x, torch.Tensor)]
    tensors = [inputs[n].requires_grad_() for n in names]
    fn = eager(op).fn
    assert torch.autograd.gradcheck(
        lambda *x: fn(**{**inputs, **dict(zip(names, x)), "qk_l2norm": True}), tensors, fast_mode=fast
    )


@pytest.mark.parametrize("lengths", [range(1, 131), [1000], [4097]], ids=["every_length", "1000", "4097"])
@pytest.mark.parametrize("op", ["chunk_gdn", "chunk_kda"])
def test_chunks_of_many_lengths(op, lengths):
    for T in lengths:
        call = registry.ops()[op].make_inputs(T=T, HK=1, HV=1, K=16, V=16, seed=T)
        holds.matches_reference(eager(op), call)


def test_memory_is_linear_in_tokens():
    from hf_gdn.eval.timing import peak_bytes

    peaks = []
    for T in (1024, 4096):
        inputs = registry.ops()["chunk_kda"].make_inputs(T=T, HK=2, HV=2, K=32, V=32)
        with torch.no_grad():
            peaks.append(peak_bytes(lambda x=inputs: eager("chunk_kda").fn(**x), torch.device("cpu")))
    # Outputs grow with T, working memory does not: far below the [.., 64, 64, K] tensor of the plain form.
    assert peaks[1] < 4 * peaks[0]
    assert peaks[1] < 4096 * 2 * 32 * 4 * 16


# --------------------------------------------------------------------------------------------- step, prologue and norm


@every_family
def test_the_operator_of_a_step_passes_opcheck(family):
    op, call = layer_call("step", family, T=3)
    tensors = *call["projected"][:6], *call["weights"], call["conv_state"], call["state"]
    tensors = [x if x is None else x.contiguous() for x in tensors]
    torch.library.opcheck(operators.STEP_OPERATORS[op], (*tensors, *call["spec"], "eager", "auto"))


@every_family
def test_a_step_compiles_as_an_operator_without_a_break(family):
    """As a kernel that torch.compile cannot look into is called; in place."""
    op, call = layer_call("step", family, T=3)
    weights, spec, kernel = call["weights"], call["spec"], opaque(op)

    def function(projected, conv_state, state):
        return operators.call_step(kernel, projected, weights, spec, conv_state, state) + 1

    results = []
    for fn in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        conv_state, state = call["conv_state"].clone(), call["state"].clone()
        results.append((fn(call["projected"], conv_state, state), conv_state, state))
    for name, got, want in zip(("y", "conv_state", "state"), *results):
        assert_close(name, got, want, SAME_SUMS)


@every_family
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_prologue_rounds_once(family, dtype):
    """q, k and v are within half a unit in the last place of what float32 gives, and the gates are float32."""
    op, call = layer_call("prologue", family, T=9, bias=True)
    projected, weights = (mapped(lambda x: x.to(dtype), call[name]) for name in ("projected", "weights"))
    made = eager(op).fn(projected, weights, call["spec"])
    exact = mapped(lambda x: x.float(), projected)
    wanted = eager(op).fn(exact, weights, call["spec"]._replace(decay_in_dtype=False))
    for name, got, want in zip("qkv", made, wanted):
        assert_same(name, got, want.to(dtype))
    assert made.g.dtype == made.beta.dtype == torch.float32


@every_family
def test_autocast_leaves_the_prologue_alone(family):
    op, call = layer_call("prologue", family, T=9, bias=True)
    plain = eager(op).fn(**call)
    with torch.autocast("cpu", torch.bfloat16):
        cast = eager(op).fn(**call)
    for name, got, want in zip(DeltaRuleInputs._fields, cast, plain):
        assert_same(name, got, want)


@every_family
@pytest.mark.parametrize("keep", [4, 0])
def test_the_operator_of_a_prologue_passes_opcheck(family, keep):
    op, call = layer_call("prologue", family, T=9, bias=True)
    projected = [x if x is None else x.contiguous() for x in call["projected"][:6]]
    conv_state = call["conv_state"] if keep else None
    given = (
        *projected,
        *call["weights"][:4],
        *call["spec"][:3],
        conv_state,
        keep,
        None,
        torch.tensor([9, 4]),
        "eager",
        "auto",
    )
    torch.library.opcheck(operators.PROLOGUE_OPERATORS[op], given)


@every_family
def test_prologue_and_norm_compile_as_operators_without_a_break(family):
    """As kernels that torch.compile cannot look into are called."""
    op, call = layer_call("prologue", family, T=9, bias=True)
    weights, spec, first, last = call["weights"], call["spec"], opaque(op), opaque("gated_norm")

    def function(projected, conv_state):
        made = operators.call_prologue(
            first, projected, weights, spec, conv_state=conv_state, keep=4, cu_seqlens=None, lengths=None
        )
        return *made, operators.call_norm(last, made.v, projected.z, weights.norm, spec) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [f(call["projected"], call["conv_state"]) for f in (compiled, function)]
    for name, got, want in zip((*DeltaRuleInputs._fields, "y"), *results, strict=True):
        assert_close(name, got, want, SAME_SUMS)


@every_family
def test_the_operator_of_the_norm_passes_opcheck(family):
    _, call = layer_call("prologue", family, T=9, bias=True)
    z, weight, spec = call["projected"].z.contiguous(), call["weights"].norm, call["spec"]
    torch.library.opcheck(operators.NORM_OPERATOR, (torch.randn(2, 9, 4, 20), z, weight, *spec[4:], "eager", "auto"))
