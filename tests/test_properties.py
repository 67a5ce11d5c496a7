"""Properties of the functional API: any valid call equals the oracle, any other raises and touches nothing.

Tolerances. The delta rule contracts: with ``beta |k|^2 <= 2`` and decays of at most 1 an error made in the state does
not grow. A token makes new errors of relative size eps, 2^-24 or for float64 inputs 2^-53, in each of its few roundings
and in sums over K; with random signs ``(sqrt(K) + 4) eps``, relative to the largest state and the largest write so far.
T tokens add up as a random walk, ``sqrt(T)``. The chunked form solves triangular systems of at most 64 rows in between,
whose condition beta up to 2 raises; a factor of 8 covers that and the tails of the random walk. One decay per head (or
KDA with one channel) takes differences of a chunk's summed log-decays, in float64: 2^-53 of the sum. o's rounding to
fp16 or bf16 comes on top, 2^-11 or 2^-8 of each element. All of it per sequence and head, in Frobenius norms: o is at
most ``scale |q| |S|``, and where terms cancel only that bounds its error.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_gdn import ops, registry
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import SAME_SUMS

FUNCTIONS = {
    "chunk_gdn": ops.chunk_gated_delta_rule,
    "recurrent_gdn": ops.fused_recurrent_gated_delta_rule,
    "chunk_kda": ops.chunk_kda,
    "recurrent_kda": ops.fused_recurrent_kda,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OUTPUT_ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
TENSORS = ("q", "k", "v", "g", "beta")
every_op = pytest.mark.parametrize("op", FUNCTIONS)


def examples(number: int) -> settings:
    """The same examples in every run, on any machine, none stored."""
    return settings(
        max_examples=number, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- calls

# Log-decays: none, mild, forgetting everything at once, everything at every place.
GATES = {
    "none": (0.0,),
    "mild": (-0.5, -0.1, -0.01),
    "total": (-1e4,),
    "mixed": (0.0, -1e-3, -1.0, -60.0, -1e4),
}
LAYOUTS = ("contiguous", "heads_first", "every_other_token", "every_other_channel", "longer_rows")


@dataclass(frozen=True)
class Case:
    """A call without its op: sizes, kinds and a seed. Every op makes its own tensors of it."""

    B: int
    T: int
    HK: int
    group: int
    K: int
    V: int
    dtype: torch.dtype
    gate: str
    beta_max: float
    layout: str
    state: bool
    l2norm: bool
    scale: float | None
    bounds: tuple[int, ...] | None
    bounds_dtype: torch.dtype
    seed: int


LENGTHS = st.integers(0, 70) | st.sampled_from([63, 64, 65, 128, 130])


@st.composite
def cases(draw, packed=None, lengths=LENGTHS, **fixed) -> Case:
    """Any valid call; `packed` True or False says whether with cu_seqlens."""
    packed = draw(st.booleans()) if packed is None else packed
    T, bounds = draw(lengths), None
    if packed:
        cuts = draw(st.lists(st.integers(0, T) | st.sampled_from([0, T]), max_size=4))
        cuts += [min(cut + 1, T) for cut in cuts[:1]]  # a sequence of one token, and empty ones where cuts agree
        bounds = (0, *sorted(cuts), T)
    values = dict(
        B=1 if packed else draw(st.integers(1, 3)),
        T=T,
        HK=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        K=draw(st.integers(1, 20)),
        V=draw(st.integers(1, 20)),
        dtype=draw(st.sampled_from(DTYPES)),
        gate=draw(st.sampled_from(sorted(GATES))),
        beta_max=draw(st.sampled_from([0.0, 1.0, 2.0])),
        layout=draw(st.sampled_from(LAYOUTS)),
        state=draw(st.booleans()),
        l2norm=draw(st.booleans()),
        scale=draw(st.none() | st.sampled_from([1.0, -0.25, 0.0])),
        bounds=bounds,
        bounds_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(st.integers(0, 2**20)),
    )
    return Case(**{**values, **fixed})


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values ``[B, T, H, ...]`` in memory of another order, NaN between them."""
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "contiguous" or (layout == "every_other_channel" and x.dim() < 4):
        return x
    where = {
        "every_other_token": (slice(None), slice(None, None, 2)),
        "every_other_channel": (..., slice(None, None, 2)),
        "longer_rows": (slice(None), slice(None), slice(1, -1)),
    }[layout]
    shape = list(x.shape)
    for dim, spread in ({"every_other_token": (1, 2), "every_other_channel": (3, 2)}.get(layout, (2, 1)),):
        shape[dim] = shape[dim] * spread + (2 if spread == 1 else 0)
    room = x.new_full(shape, float("nan"))
    room[where] = x
    return room[where]


def build(op: str, case: Case) -> dict:
    """Keyword arguments of the public function."""
    random = torch.Generator().manual_seed(case.seed)
    HV, wide = case.HK * case.group, torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def keys():
        # Norms up to 3 where they are normalised inside; else 0.98, so that beta |k|^2 <= 2 also after rounding.
        x = normal(case.B, case.T, case.HK, case.K)
        x = x / x.norm(dim=-1, keepdim=True)
        return x * (3 if case.l2norm else 0.98) * torch.rand(*x.shape[:3], 1, generator=random, dtype=torch.float64)

    levels = torch.tensor(GATES[case.gate], dtype=torch.float64)
    shape = (case.B, case.T, HV, *([case.K] if op.endswith("kda") else []))
    tensors = dict(
        q=keys().to(case.dtype),
        k=keys().to(case.dtype),
        v=normal(case.B, case.T, HV, case.V).to(case.dtype),
        g=levels[torch.randint(len(levels), shape, generator=random)].to(wide),
        beta=(case.beta_max * torch.rand(case.B, case.T, HV, generator=random, dtype=torch.float64)).to(case.dtype),
    )
    tensors = {name: lay_out(x, case.layout) for name, x in tensors.items()}
    sequences = case.B if case.bounds is None else len(case.bounds) - 1
    return dict(
        tensors,
        initial_state=normal(sequences, HV, case.K, case.V).to(wide) if case.state else None,
        cu_seqlens=None if case.bounds is None else torch.tensor(case.bounds, dtype=case.bounds_dtype),
        scale=case.scale,
        use_qk_l2norm_in_kernel=case.l2norm,
        output_final_state=True,
        backend="eager",
    )


def part(arguments: dict, tokens: slice = slice(None), rows: slice = slice(None), state=None) -> dict:
    """A call on some tokens or rows, without boundaries."""
    pieces = {name: arguments[name][rows, tokens] for name in TENSORS}
    return {**arguments, **pieces, "initial_state": state, "cu_seqlens": None}


def sequences(arguments: dict) -> list[dict]:
    """One call per sequence."""
    state, bounds = arguments["initial_state"], arguments["cu_seqlens"]

    def of(n):
        return None if state is None else state[n : n + 1]

    if bounds is None:
        return [part(arguments, rows=slice(n, n + 1), state=of(n)) for n in range(len(arguments["q"]))]
    return [part(arguments, slice(*ends), state=of(n)) for n, ends in enumerate(pairwise(bounds.tolist()))]


def joined(arguments: dict, results: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of single sequences as the whole call gives them."""
    along = 0 if arguments["cu_seqlens"] is None else 1
    return torch.cat([o for o, _ in results], along), torch.cat([state for _, state in results])


# ------------------------------------------------------------------------------------------------- oracle and tolerance


@dataclass(frozen=True)
class Exact:
    """The oracle's result for one sequence and how large an error may be: ``[HV]`` each."""

    o: torch.Tensor
    state: torch.Tensor
    o_budget: torch.Tensor
    state_budget: torch.Tensor


def exact(op: str, arguments: dict) -> Exact:
    """The oracle token by token over one sequence, and the budgets of the docstring above."""
    q, k, v, g, beta = (arguments[name].double() for name in TENSORS)
    K, T = q.shape[-1], q.shape[1]
    scale = K**-0.5 if arguments["scale"] is None else arguments["scale"]
    state = arguments["initial_state"]
    state = v.new_zeros(1, v.shape[2], K, v.shape[3]) if state is None else state.double()
    reach = state.norm(dim=(-2, -1))  # largest state and largest write so far
    outputs, seen = [v[:, :0]], v.new_zeros(1, v.shape[2])
    for t in range(T):
        one = (x[:, t : t + 1] for x in (q, k, v, g, beta))
        o, state = registry.ops()[op].reference(
            *one, scale=scale, initial_state=state, qk_l2norm=arguments["use_qk_l2norm_in_kernel"]
        )
        reach = torch.maximum(reach, state.norm(dim=(-2, -1)))
        reach = torch.maximum(reach, beta[:, t].abs() * v[:, t].norm(dim=-1))
        keys = 1.0 if arguments["use_qk_l2norm_in_kernel"] else q[:, t].norm(dim=-1)
        keys = torch.as_tensor(keys).expand(1, q.shape[2]).repeat_interleave(v.shape[2] // q.shape[2], 1)
        seen = seen + (scale * keys).square()
        outputs.append(o)
    o = torch.cat(outputs, 1)
    eps = 2**-53 if arguments["v"].dtype == torch.float64 else 2**-24
    relative = 8 * max(T, 1) ** 0.5 * (K**0.5 + 4) * eps
    if (op == "chunk_gdn" or (op == "chunk_kda" and K == 1)) and T:
        relative += min(T, 64) * g.abs().max().item() * 2**-53
    rounding = OUTPUT_ROUNDING.get(arguments["v"].dtype, 0) * o.norm(dim=(1, 3))
    return Exact(o, state, (relative * reach * seen.sqrt() + rounding)[0], (relative * reach)[0])


def assert_within(name: str, got: torch.Tensor, wanted: torch.Tensor, dims: tuple[int, ...], budget) -> None:
    """Compare ``[1, ...]`` with the oracle, head by head."""
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    off = (got.double() - wanted).norm(dim=dims)[0]
    assert (off <= budget).all(), f"{name}: errors {off.tolist()}, budgets {budget.tolist()}"


def check(op: str, arguments: dict, got: tuple[torch.Tensor, torch.Tensor], factor: float = 1.0) -> None:
    """Compare a call's result with the oracle's, sequence by sequence, within `factor` budgets."""
    o, state = got
    assert o.dtype == arguments["v"].dtype
    assert state.dtype == (torch.float64 if o.dtype == torch.float64 else torch.float32)
    bounds = arguments["cu_seqlens"]
    for n, one in enumerate(sequences(arguments)):
        mine = o[n : n + 1] if bounds is None else o[:, bounds[n] : bounds[n + 1]]
        wanted = exact(op, one)
        assert_within(f"o of sequence {n}", mine, wanted.o, (1, 3), factor * wanted.o_budget)
        assert_within(f"state {n}", state[n : n + 1], wanted.state, (2, 3), factor * wanted.state_budget)


def bits(arguments: dict) -> dict[str, torch.Tensor]:
    """Copies of all tensors among the arguments."""
    return {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Equal shape, dtype and values, NaN equal to NaN and -0 not to 0."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(x.contiguous().flatten().view(torch.uint8), y.contiguous().flatten().view(torch.uint8))


def assert_untouched(arguments: dict, before: dict[str, torch.Tensor]) -> None:
    touched = [name for name, x in before.items() if x.device.type != "meta" and not same_bits(arguments[name], x)]
    assert not touched, f"changed: {', '.join(touched)}"


# --------------------------------------------------------------------------------------------------------- valid calls


@every_op
@examples(60)
@given(case=cases())
def test_any_valid_call_equals_the_oracle_and_leaves_its_inputs_alone(op, case):
    arguments = build(op, case)
    before = bits(arguments)
    check(op, arguments, FUNCTIONS[op](**arguments))
    assert_untouched(arguments, before)
    assert FUNCTIONS[op](**{**arguments, "output_final_state": False})[1] is None


@pytest.mark.parametrize("rule", ["gdn", "kda"])
@examples(40)
@given(case=cases())
def test_chunk_is_recurrent(rule, case):
    arguments = build(f"chunk_{rule}", case)
    chunk, recurrent = (FUNCTIONS[f"{form}_{rule}"](**arguments) for form in ("chunk", "recurrent"))
    bounds = arguments["cu_seqlens"]
    for n, one in enumerate(sequences(arguments)):
        budget = exact(f"chunk_{rule}", one)
        here = (slice(n, n + 1),) if bounds is None else (slice(None), slice(bounds[n], bounds[n + 1]))
        assert_within(f"o of sequence {n}", chunk[0][here], recurrent[0][here].double(), (1, 3), 2 * budget.o_budget)
        assert_within(
            f"state {n}", chunk[1][n : n + 1], recurrent[1][n : n + 1].double(), (2, 3), 2 * budget.state_budget
        )


@every_op
@examples(30)
@given(case=cases(packed=False), data=st.data())
def test_split_anywhere_is_whole(op, case, data):
    arguments = build(op, case)
    cuts = sorted(data.draw(st.lists(st.integers(0, case.T), min_size=1, max_size=3), label="cuts"))
    outputs, state = [], arguments["initial_state"]
    for ends in pairwise((0, *cuts, case.T)):
        form = data.draw(st.sampled_from(["chunk", "recurrent"]), label="form")
        o, state = FUNCTIONS[f"{form}_{op.partition('_')[2]}"](**part(arguments, slice(*ends), state=state))
        outputs.append(o)
    check(op, arguments, (torch.cat(outputs, 1), state))


@every_op
@examples(30)
@given(case=cases(packed=True))
def test_packed_is_separate_to_the_bit(op, case):
    assert_alone(op, case)


@every_op
@examples(30)
@given(case=cases(packed=False), sizes=st.tuples(*[st.sampled_from([8, 16, 32, 64])] * 2))
def test_batched_is_single_to_the_bit(op, case, sizes):
    """In sizes like those of models. BLAS takes other paths for one very small matrix than for several."""
    assert_alone(op, replace(case, K=sizes[0], V=sizes[1], HK=case.HK + 1))


def assert_alone(op, case):
    arguments = build(op, case)
    got = FUNCTIONS[op](**arguments)
    wanted = joined(arguments, [FUNCTIONS[op](**one) for one in sequences(arguments)])
    assert same_bits(got[0], wanted[0]) and same_bits(got[1], wanted[1])


@every_op
@examples(30)
@given(case=cases())
def test_runs_and_layouts_agree_to_the_bit(op, case):
    arguments = build(op, case)
    first = FUNCTIONS[op](**arguments)
    plain = {name: x.contiguous() if name in TENSORS else x for name, x in arguments.items()}
    for again in (arguments, plain):
        assert all(same_bits(x, y) for x, y in zip(first, FUNCTIONS[op](**again)))


@every_op
@examples(30)
@given(case=cases(lengths=st.integers(1, 70)), data=st.data())
def test_what_is_not_finite_stays_in_its_sequence(op, case, data):
    clean = build(op, case)
    ill = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in clean.items()}
    names = [name for name in (*TENSORS, "initial_state") if ill[name] is not None]
    name = data.draw(st.sampled_from(names), label="tensor")
    value = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]), label="value")
    bounds = clean["cu_seqlens"]
    count = case.B if bounds is None else len(bounds) - 1
    n = data.draw(st.integers(0, count - 1), label="sequence")
    if name == "initial_state" or bounds is None:
        ill[name][n] = value
    else:
        ill[name][:, bounds[n] : bounds[n + 1]] = value
    (o, state), (ill_o, ill_state) = FUNCTIONS[op](**clean), FUNCTIONS[op](**ill)
    others = torch.arange(count) != n
    assert same_bits(ill_state[others], state[others])
    if bounds is None:
        assert same_bits(ill_o[others], o[others])
    else:
        assert same_bits(ill_o[:, : bounds[n]], o[:, : bounds[n]])
        assert same_bits(ill_o[:, bounds[n + 1] :], o[:, bounds[n + 1] :])


@pytest.mark.parametrize("lowest", [-1e30, float("-inf")])
@pytest.mark.parametrize(
    ("op", "channels"),
    [
        ("recurrent_gdn", 8),
        ("recurrent_kda", 8),
        ("recurrent_kda", 1),
        ("chunk_kda", 8),
        ("chunk_kda", 1),  # served as GDN
        ("chunk_gdn", 8),
    ],
)
@examples(15)
@given(data=st.data())
def test_decays_without_a_bound(op, channels, lowest, data):
    """exp(g) = 0 forgets everything and says nothing about later tokens: -1e4 and anything below it are the same.

    The budget is fp32's 2^-24 over a few terms; chunk_gdn's summed log-decays are off by 64e4 2^-53, far below it.
    """
    lengths = st.integers(2, 70)
    case = cases(packed=False, gate="mixed", dtype=torch.float32, K=channels, lengths=lengths)
    arguments = build(op, data.draw(case, label="case"))
    wanted = FUNCTIONS[op](**arguments)
    arguments["g"] = arguments["g"].masked_fill(arguments["g"] == -1e4, lowest)
    for name, got, want in zip(("o", "state"), FUNCTIONS[op](**arguments), wanted):
        assert_close(name, got, want, SAME_SUMS)


# ------------------------------------------------------------------------------------------------------- invalid calls


def wrong(name: str, make):
    """A fault in one argument: ``make(x, arguments, draw)`` returns its wrong value."""

    def fault(arguments, draw):
        return {name: make(arguments[name], arguments, draw)}

    return fault


def longer(dim: int):
    """One element more or less along a dimension."""

    def make(x, arguments, draw):
        keep = x.shape[dim] - 1
        if keep > 0 and draw(st.booleans()):
            return x.narrow(dim, 0, keep).clone()
        return torch.cat((x, x.narrow(dim, 0, 1)), dim)

    return make


def another_dtype(x, arguments, draw):
    """The recurrent functions take fp32 beside 16 bits, as fla's do (tests/test_ops.py)."""
    return x.to(draw(st.sampled_from([dtype for dtype in (torch.float64, torch.int64) if dtype != x.dtype])))


def bounds(*values):
    def make(x, arguments, draw):
        T = arguments["q"].shape[1]
        made = [value(T) if callable(value) else value for value in values]
        return torch.tensor(made, dtype=draw(st.sampled_from([torch.int32, torch.int64])))

    return make


def end(T):
    return T


# Fault -> (what it does to the arguments, exception, what its text says). The calls have T >= 3, a state, and B = 2, or
# where the fault is in the packing B = 1 and cu_seqlens.
FAULTS = {
    **{
        f"{name} without a dimension": (wrong(name, lambda x, *_: x[0]), ValueError, rf"^{name} must be \[")
        for name in (*TENSORS, "initial_state")
    },
    **{
        f"{name} with another size in dimension {dim}": (wrong(name, longer(dim)), ValueError, rf"\b{text}\b")
        for name, dim, text in [
            ("q", 0, "k must be"), ("q", 1, "k must be"), ("q", 2, "k must be"), ("q", 3, "k must be"),
            ("k", 0, "k must be"), ("k", 1, "k must be"), ("k", 2, "k must be"), ("k", 3, "k must be"),
            ("v", 0, "v must be"), ("v", 1, "v must be"), ("v", 2, "(v's heads must be a multiple|g must be)"),
            ("v", 3, "initial_state must be"),
            ("g", 0, "g must be"), ("g", 1, "g must be"), ("g", 2, "g must be"),
            ("beta", 0, "beta must be"), ("beta", 1, "beta must be"), ("beta", 2, "beta must be"),
            *[("initial_state", dim, "initial_state must be") for dim in range(4)],
        ]
    },
    **{
        f"{name} of another dtype": (wrong(name, another_dtype), ValueError, "q, k and v must have one floating-point")
        for name in ("q", "k", "v")
    },
    **{
        f"{name} on another device": (
            wrong(name, lambda x, *_: x.to("meta")), ValueError, rf"must be on one device, got .*\b{name} on meta"
        )
        for name in (*TENSORS, "initial_state")
    },
    "gates of the other rule": (
        wrong("g", lambda x, arguments, draw: x[..., 0] if x.dim() == 4 else x[..., None]), ValueError, r"^g must be \["
    ),
    "HV not a multiple of HK": (
        lambda arguments, draw: {
            n: arguments[n][:, :, :1].expand(-1, -1, arguments["v"].shape[2] + 1, -1) for n in ("q", "k")
        },
        ValueError,
        r"v's heads must be a multiple of q's and k's, got HV = \d+ and HK = \d+",
    ),
    "no key heads": (
        lambda arguments, draw: {n: arguments[n][:, :, :0] for n in ("q", "k")}, ValueError, "got HV = .* and HK = 0"
    ),
    "cu_seqlens with B > 1": (
        wrong("cu_seqlens", bounds(0, end)), ValueError, "cu_seqlens .* B must be 1, got B = 2"
    ),
    "packed: not from 0": (wrong("cu_seqlens", bounds(1, 2, end)), ValueError, r"^cu_seqlens must start at 0"),
    "packed: falling": (wrong("cu_seqlens", bounds(0, 2, 1, end)), ValueError, r"^cu_seqlens must .*never fall"),
    "packed: negative": (wrong("cu_seqlens", bounds(0, -1, end)), ValueError, r"^cu_seqlens must .*never fall"),
    "packed: too long": (wrong("cu_seqlens", bounds(0, 1, lambda T: T + 1)), ValueError, r"^cu_seqlens .*end at T"),
    "packed: too short": (wrong("cu_seqlens", bounds(0, 1, lambda T: T - 1)), ValueError, r"^cu_seqlens .*end at T"),
    "packed: beyond the end": (wrong("cu_seqlens", bounds(0, 10**6, end)), ValueError, r"^cu_seqlens .*never fall"),
    "packed: of another dtype": (
        wrong("cu_seqlens", lambda x, arguments, draw: x.to(draw(st.sampled_from([torch.float32, torch.int16])))),
        ValueError, "^cu_seqlens must be int32 or int64",
    ),
    "packed: two-dimensional": (wrong("cu_seqlens", lambda x, *_: x[None]), ValueError, "^cu_seqlens must be int32"),
    "packed: a single bound": (wrong("cu_seqlens", lambda x, *_: x[:1]), ValueError, "^cu_seqlens must be int32"),
    "packed: on another device": (
        wrong("cu_seqlens", lambda x, *_: x.to("meta")), ValueError, "one device, got .*cu_seqlens on meta"
    ),
    "packed: a state too few or too many": (wrong("initial_state", longer(0)), ValueError, "^initial_state must be"),
    "an unknown argument": (lambda *_: dict(colour=1), TypeError, "unexpected keyword argument 'colour'"),
    "an argument that is not served": (
        lambda arguments, draw: {draw(st.sampled_from(["head_first", "use_graph"])): True},
        TypeError, "does not support (head_first|use_graph)=True",
    ),
    "an unknown backend": (lambda *_: dict(backend="gpu"), ValueError, "unknown backend 'gpu'"),
    "a backend that cannot serve": (lambda *_: dict(backend="triton"), registry.BackendError, "'triton' cannot serve"),
    "a gate without A_log": (lambda *_: dict(use_gate_in_kernel=True), ValueError, "needs A_log"),
    "A_log without a gate": (lambda *_: dict(A_log=torch.zeros(1)), TypeError, "A_log.* need use_gate_in_kernel=True"),
}  # fmt: skip


@every_op
@pytest.mark.parametrize("fault", FAULTS)
@examples(6)
@given(data=st.data())
def test_any_invalid_call_raises_and_touches_nothing(op, fault, data):
    packed = fault.startswith("packed")
    lengths, B = st.integers(3, 70), 1 if packed else 2
    arguments = build(op, data.draw(cases(packed=packed, lengths=lengths, B=B, state=True), label="case"))
    change, error, text = FAULTS[fault]
    arguments = {**arguments, **change(arguments, data.draw)}
    if packed and "state" not in fault:
        arguments["initial_state"] = None  # whose shape would be found first
    before = bits(arguments)
    with pytest.raises(error, match=text):
        FUNCTIONS[op](**arguments)
    assert_untouched(arguments, before)


GATE_FAULTS = {
    "A_log too long": (dict(A_log=5), "A_log"),
    "dt_bias too long": (dict(dt_bias=5), "dt_bias"),
    "A_log on another device": (dict(A_log="meta"), "A_log"),
    "dt_bias on another device": (dict(dt_bias="meta"), "dt_bias"),
}


@every_op
@pytest.mark.parametrize("fault", GATE_FAULTS)
def test_parameters_of_the_gate_are_checked_by_name(op, fault):
    arguments = {n: x for n, x in registry.ops()[op].make_inputs(T=5, K=3, V=4).items() if n in TENSORS}
    right = dict(A_log=torch.zeros(2), dt_bias=torch.zeros(arguments["g"].shape[2:]).flatten())
    FUNCTIONS[op](**arguments, use_gate_in_kernel=True, **right)
    ((name, value),) = GATE_FAULTS[fault][0].items()
    bad = right[name].to("meta") if value == "meta" else torch.cat((right[name], right[name][:1]))
    with pytest.raises(ValueError, match=name):
        FUNCTIONS[op](**arguments, use_gate_in_kernel=True, **{**right, name: bad})


def test_every_argument_is_known_to_these_tests():
    """A new argument of the functions wants a property of its own."""
    served = {name for function in FUNCTIONS.values() for name in inspect.signature(function).parameters}
    assert served == {
        *TENSORS, "initial_state", "cu_seqlens", "scale", "use_qk_l2norm_in_kernel", "output_final_state", "backend",
        "gk", "gv", "A_log", "dt_bias", "lower_bound", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel",
        "allow_neg_eigval", "kwargs",
    }  # fmt: skip
