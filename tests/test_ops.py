"""The functional API: fla's names and semantics, operators, errors."""

import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch

from hf_gdn import dispatch, operators, ops, registry
from hf_gdn.registry import BackendError
from hf_gdn.testing import assert_close, error
from hf_gdn.testing.tolerances import DELTA_RULE, SAME_SUMS
from tests import tiny_models as tiny

FUNCTIONS = {
    "chunk_gdn": ops.chunk_gated_delta_rule,
    "recurrent_gdn": ops.fused_recurrent_gated_delta_rule,
    "chunk_kda": ops.chunk_kda,
    "recurrent_kda": ops.fused_recurrent_kda,
}
pytestmark = pytest.mark.parametrize("op", FUNCTIONS)


def make(op, **kwargs):
    """Keyword arguments of the public function, with a state."""
    inputs = registry.ops()[op].make_inputs(**{"T": 70, "HK": 2, "HV": 4, "K": 8, "V": 12, **kwargs})
    return {name: inputs[name] for name in ("q", "k", "v", "g", "beta", "initial_state")}


def oracle(op, inputs, **kwargs):
    exact = {n: None if x is None else x.double() for n, x in inputs.items()}
    return registry.ops()[op].reference(**exact, scale=inputs["q"].shape[-1] ** -0.5, **kwargs)


def test_agrees_with_the_oracle(op):
    inputs = make(op)
    o, state = FUNCTIONS[op](**inputs, output_final_state=True)
    wanted = oracle(op, inputs)
    assert_close("o", o, wanted[0], DELTA_RULE[torch.float32])
    assert_close("state", state, wanted[1], DELTA_RULE[torch.float32])
    assert FUNCTIONS[op](**inputs)[1] is None
    scaled, _ = FUNCTIONS[op](**inputs, scale=1.0)
    assert_close("scale", scaled, wanted[0] * 8**0.5, DELTA_RULE[torch.float32])


def test_l2norm_and_packing(op):
    inputs = make(op)
    bounds = torch.tensor([0, 3, 3, 70], dtype=torch.int32)
    inputs["initial_state"] = torch.randn(3, 4, 8, 12)
    o, state = FUNCTIONS[op](**inputs, cu_seqlens=bounds, use_qk_l2norm_in_kernel=True, output_final_state=True)
    wanted = oracle(op, inputs, cu_seqlens=bounds, qk_l2norm=True)
    assert_close("o", o, wanted[0], DELTA_RULE[torch.float32])
    assert_close("state", state, wanted[1], DELTA_RULE[torch.float32])


def test_gate_and_beta_in_kernel(op):
    inputs = make(op)
    raw = torch.randn_like(inputs["g"])
    A_log, dt_bias = torch.randn(4), torch.randn(raw.shape[2:])
    rate = A_log.exp().view(4, *[1] * (raw.dim() - 3))
    g = -rate * torch.nn.functional.softplus(raw + dt_bias)
    beta = torch.randn_like(inputs["beta"])
    wanted, _ = FUNCTIONS[op](**{**inputs, "g": g, "beta": 2 * beta.sigmoid()})
    got, _ = FUNCTIONS[op](
        **{**inputs, "g": raw, "beta": beta}, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias.flatten(),
        use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True,
    )  # fmt: skip
    assert_close("o", got, wanted, SAME_SUMS)
    with pytest.raises(ValueError, match="needs A_log"):
        FUNCTIONS[op](**inputs, use_gate_in_kernel=True)
    with pytest.raises(TypeError, match="need use_gate_in_kernel=True"):
        FUNCTIONS[op](**inputs, A_log=A_log)
    if op.endswith("kda"):
        bounded, _ = FUNCTIONS[op](**{**inputs, "g": raw}, use_gate_in_kernel=True, A_log=A_log, lower_bound=-5.0)
        wanted, _ = FUNCTIONS[op](**{**inputs, "g": -5 * torch.sigmoid(rate * raw)})
        assert_close("bounded gate", bounded, wanted, SAME_SUMS)


def test_operators_pass_opcheck(op):
    inputs = make(op, T=5)
    bounds = torch.tensor([0, 2, 5])
    for cu_seqlens, state in itertools.product((None, bounds), (None, inputs["initial_state"])):
        if state is not None and cu_seqlens is not None:
            state = torch.cat((state, state))
        arguments = (
            *(inputs[n] for n in ("q", "k", "v", "g", "beta")),
            state,
            cu_seqlens,
            0.3,
            True,
            1.0,
            "eager",
            "auto",
        )
        torch.library.opcheck(operators.OPERATORS[op], arguments)
        if op in operators.INPLACE_OPERATORS and state is not None:
            torch.library.opcheck(operators.INPLACE_OPERATORS[op], arguments)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiles_without_a_break(op, backend):
    inputs = make(op)

    def function(q, k, v, g, beta, initial_state):
        o, state = FUNCTIONS[op](q * 2, k, v, g, beta=beta, initial_state=initial_state, output_final_state=True)
        return o + 1, state

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for got, wanted in zip(compiled(**inputs), function(**inputs)):
        assert_close(op, got, wanted, SAME_SUMS)


def test_gradients_are_the_oracles_and_compile(op):
    inputs = make(op, T=20)
    leaves = [x.clone().requires_grad_() for x in inputs.values()]

    def loss(q, k, v, g, beta, initial_state):
        o, state = FUNCTIONS[op](q, k, v, g, beta=beta, initial_state=initial_state, output_final_state=True)
        return o.square().sum() + state.sum()

    exact = [x.double().requires_grad_() for x in inputs.values()]
    o, state = registry.ops()[op].reference(*exact[:5], scale=8**-0.5, initial_state=exact[5])
    wanted = torch.autograd.grad(o.square().sum() + state.sum(), exact)
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        for name, got, want in zip(inputs, torch.autograd.grad(function(*leaves), leaves), wanted):
            assert_close(f"gradient of {name}", got, want, DELTA_RULE[torch.float32])


def test_unsupported_arguments_are_named(op):
    inputs = make(op)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        FUNCTIONS[op](**inputs, colour=1)
    for argument, (default, reason) in ops.REFUSED.items():
        with pytest.raises(TypeError, match=rf"does not support {argument}=1; .*: {re.escape(reason)}"):
            FUNCTIONS[op](**inputs, **{argument: 1})
        FUNCTIONS[op](**inputs, **{argument: default})


# Signatures of fla-core 0.6.0; of each function those that it does not share with all others.
FLA = {
    "chunk_gdn": "state_v_first cu_seqlens_cpu chunk_indices cp_context",
    "recurrent_gdn": "gk gv use_gate_in_kernel A_log dt_bias state_v_first",
    "chunk_kda": "use_gate_in_kernel A_log dt_bias safe_gate lower_bound disable_recompute return_intermediate_states "
    "state_v_first cu_seqlens_cpu cp_context use_graph max_num_seqs chunk_size transpose_state_layout",
    "recurrent_kda": "A_log dt_bias use_gate_in_kernel lower_bound state_v_first",
}
COMMON = (
    "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_beta_sigmoid_in_kernel "
    "allow_neg_eigval cu_seqlens"
)


def test_every_argument_of_fla_is_in_the_table(op):
    """docs/fla.md says of each what becomes of it, and that is what does."""
    page = (Path(__file__).parents[1] / "docs" / "fla.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (served|hint|refused)\b", page, re.M))
    own = inspect.signature(FUNCTIONS[op]).parameters
    for argument in f"{COMMON} {FLA[op]}".split():
        kind = "refused" if argument in ops.REFUSED else "hint" if argument in ops.HINTS else "served"
        assert rows[argument] == kind, argument
        assert kind != "served" or argument in own or argument in ("state_v_first", "transpose_state_layout")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_q_and_k_in_fp32_beside_v_in_16_bits(op, dtype):
    """fla's recurrent functions compute in fp32; its chunked ones do not compile."""
    inputs = make(op)
    mixed = {**inputs, "v": inputs["v"].to(dtype)}
    if op.startswith("chunk"):
        with pytest.raises(ValueError, match=rf"one floating-point dtype, got torch.float32, torch.float32, {dtype}"):
            FUNCTIONS[op](**mixed)
        return
    o, state = FUNCTIONS[op](**mixed, output_final_state=True)
    wanted = FUNCTIONS[op](**{**inputs, "v": mixed["v"].float()}, output_final_state=True)
    assert torch.equal(o, wanted[0].to(dtype)) and torch.equal(state, wanted[1])


def test_hints_change_nothing(op):
    inputs = make(op)
    wanted = FUNCTIONS[op](**inputs, output_final_state=True)
    hints = dict(chunk_size=32, cu_seqlens_cpu=torch.tensor([0, 70]), chunk_indices=None, disable_recompute=True)
    got = FUNCTIONS[op](**inputs, **hints, safe_gate=True, output_final_state=True)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted))


def test_states_with_values_first(op):
    inputs = make(op)
    wanted = FUNCTIONS[op](**inputs, output_final_state=True)
    turned = {**inputs, "initial_state": inputs["initial_state"].transpose(-1, -2).contiguous()}
    for name in ("state_v_first", "transpose_state_layout"):
        o, state = FUNCTIONS[op](**turned, **{name: True}, output_final_state=True)
        assert torch.equal(o, wanted[0]) and torch.equal(state, wanted[1].transpose(-1, -2)) and state.is_contiguous()
        with pytest.raises(ValueError, match="initial_state"):
            FUNCTIONS[op](**inputs, **{name: True})


def test_a_safe_gate_needs_its_bound(op):
    if "lower_bound" in FLA[op]:
        with pytest.raises(ValueError, match="safe_gate=True with use_gate_in_kernel=True needs lower_bound"):
            FUNCTIONS[op](**make(op), safe_gate=True, use_gate_in_kernel=True)


def test_wrong_shapes_and_devices(op):
    inputs = make(op)
    kda = op.endswith("kda")
    bad = [
        ({"q": inputs["q"][0]}, r"q must be \[B, T, heads, dim\], got \[70, 2, 8\]"),
        ({"k": inputs["k"][:, :69]}, r"k must be \[B, T, HK, K\] like q = \[1, 70, 2, 8\], got \[1, 69, 2, 8\]"),
        ({"v": inputs["v"][:, :, :3], "beta": inputs["beta"][:, :, :3]}, "HV = 3 and HK = 2"),
        ({"g": inputs["g"][..., 0] if kda else inputs["g"][..., None]}, r"g must be \[B, T, HV"),
        ({"beta": inputs["beta"][..., :2]}, r"beta must be \[B, T, HV\] = \[1, 70, 4\], got \[1, 70, 2\]"),
        ({"initial_state": inputs["initial_state"][..., :5]}, r"initial_state must be \[N, HV, K, V\]"),
        ({"k": inputs["k"].double()}, "one floating-point dtype"),
        ({"beta": inputs["beta"].to("meta")}, "all tensors must be on one device, got q on cpu.*beta on meta"),
        ({"cu_seqlens": torch.tensor([0.0, 70.0])}, "cu_seqlens must be int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 50, 40, 70])}, r"never fall, and end at T = 70, got \[0, 50, 40, 70\]"),
        ({"cu_seqlens": torch.tensor([0, 60])}, "end at T = 70"),
    ]
    for change, text in bad:
        arguments = {**inputs, **change}
        if "cu_seqlens" in change:
            arguments["initial_state"] = None
        with pytest.raises(ValueError, match=text):
            FUNCTIONS[op](**arguments)
    with pytest.raises(ValueError, match="B must be 1, got B = 2"):
        doubled = {n: torch.cat((x, x)) for n, x in inputs.items() if n != "initial_state"}
        FUNCTIONS[op](**doubled, cu_seqlens=torch.tensor([0, 70]))


def test_bounds_changed_in_place_are_read_again(op):
    inputs = {**make(op), "initial_state": None}
    bounds = torch.tensor([0, 30, 70])
    FUNCTIONS[op](**inputs, cu_seqlens=bounds)
    bounds[1] = 80
    with pytest.raises(ValueError, match="never fall"):
        FUNCTIONS[op](**inputs, cu_seqlens=bounds)


def test_a_host_copy_of_the_bounds_is_read_instead(op):
    inputs = {**make(op), "initial_state": None}
    bounds, copy = torch.tensor([0, 30, 70]), torch.tensor([0, 30, 70], dtype=torch.int32)
    for inference in (False, True):
        with torch.inference_mode(inference):
            got = FUNCTIONS[op](**inputs, cu_seqlens=bounds.clone(), cu_seqlens_cpu=copy, output_final_state=True)
            wanted = FUNCTIONS[op](**inputs, cu_seqlens=bounds, output_final_state=True)
            assert all(torch.equal(x, y) for x, y in zip(got, wanted))
            unreadable = dispatch.check_copy(bounds.to("meta"), copy, 70)
            dispatch.check_bounds(unreadable, 70)
    for wrong, text in (
        (bounds[:2], r"a copy of cu_seqlens on the CPU, \[3\], got \[2\] on cpu"),
        (bounds.to("meta"), r"got \[3\] on meta"),
        (torch.tensor([0, 31, 70]), r"must equal cu_seqlens, \[0, 30, 70\], got \[0, 31, 70\]"),
    ):
        with pytest.raises(ValueError, match=text):
            FUNCTIONS[op](**inputs, cu_seqlens=bounds, cu_seqlens_cpu=wrong)


def test_backends_by_name(op):
    inputs = make(op)
    assert error(FUNCTIONS[op](**inputs, backend=tiny.ON_A_CPU[0])[0], FUNCTIONS[op](**inputs)[0]) == 0
    with pytest.raises(BackendError, match="backend 'triton' cannot serve .* needs"):
        FUNCTIONS[op](**inputs, backend="triton")
    with pytest.raises(ValueError, match="unknown backend 'gpu'; valid backends: auto, triton"):
        FUNCTIONS[op](**inputs, backend="gpu")
