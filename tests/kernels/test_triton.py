"""What only the Triton kernels have, in Triton's interpreter: tiles, chunks of two kinds, scans in segments, roundings.

The invariants of all backends are in tests/kernels/test_cases.py. Uninitialised memory is NaN here (tests/conftest.py),
so that a value read before it was written shows.
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")
from hf_gdn import registry
from hf_gdn.kernels.triton.runtime import INTERPRET, NOT_MEASURED

if not INTERPRET:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from hf_gdn.kernels.eager.gated_norm import gated_norm as eager_norm
from hf_gdn.kernels.triton import chunk_kda, prologue, recurrent, segmented_scan, step
from hf_gdn.kernels.triton.chunk_kda_prepare import WIDEST
from hf_gdn.kernels.triton.math import softplus
from hf_gdn.kernels.triton.tokens import TOKEN_CONFIGS
from hf_gdn.testing import assert_close, assert_no_worse, assert_same, calls
from hf_gdn.testing import call_changes as change
from hf_gdn.testing import invariants as holds
from hf_gdn.testing.case import DTYPES, FAMILIES
from hf_gdn.testing.tolerances import HARD_CALLS, budget

from .plain import rounded_chunks

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_chunks = pytest.mark.parametrize("op", ["chunk_gdn", "chunk_kda"])
both_recurrent = pytest.mark.parametrize("op", ["recurrent_gdn", "recurrent_kda"])


def kernel(op):
    return registry.get(op, "triton")


def make(op, **sizes):
    return registry.ops()[op].make_inputs(**{"HK": 1, "HV": 1, "K": 16, "V": 16, **sizes})


def check_same(got: calls.Results, wanted: calls.Results):
    for name, x in wanted.items():
        assert_same(name, got[name], x)


# --------------------------------------------------------------------------------------------------- token by token


@both_recurrent
@pytest.mark.parametrize("tile", [(config.BV, config.num_warps) for config in TOKEN_CONFIGS], ids=str)
def test_every_tile_of_the_recurrent_rule_gives_the_same_bits(op, tile, monkeypatch):
    call = change.to_normalise(make(op, T=2, K=24, V=80))
    wanted = calls.run(kernel(op), call)
    monkeypatch.setattr(recurrent, "tile_config", lambda *_: tile)
    check_same(holds.matches_reference(kernel(op), call), wanted)


@both_recurrent
def test_refuses_a_state_it_cannot_update(op):
    call = make(op, T=2, HV=2, V=8)
    for state, complaint in (
        (None, "it is None"),
        (call["initial_state"].mT.contiguous().mT, "contiguous float32 initial_state; it is float32 of shape"),
        (call["initial_state"].half(), "it is float16"),
    ):
        with pytest.raises(ValueError, match=complaint):
            kernel(op).fn(**{**call, "initial_state": state}, inplace=True)


@both_recurrent
def test_refuses_token_states_it_cannot_write(op):
    with pytest.raises(ValueError, match=r"contiguous float32 \[K, V\] matrices; it is float32 of shape"):
        kernel(op).fn(**make(op, T=2, HV=2, V=8), token_states=torch.empty(1, 2, 2, 8, 16).mT)


def test_every_tile_of_a_step_gives_the_same_bits(monkeypatch):
    call, results = make("step_gdn", B=3, T=2, HV=2, V=32), []
    for tile in [(8, 1), (16, 2), (32, 4)]:
        monkeypatch.setattr(step, "tile_config", lambda *_, tile=tile: tile)
        results.append(holds.matches_reference(kernel("step_gdn"), call))
    for one, other in itertools.pairwise(results):
        check_same(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_a_prologue_anywhere_in_memory(dtype):
    """Four weights of a channel are one load where 8 divides their address; elsewhere the bits are the same."""
    call = make("prologue_gdn", B=2, T=65, HV=2, K=8, dtype=dtype)
    weight = call["weights"].conv
    moved = torch.empty(weight.numel() + 1, dtype=dtype)[1:].view(weight.shape).copy_(weight)
    assert prologue.in_words(weight) and not prologue.in_words(moved)
    elsewhere = {**call, "weights": call["weights"]._replace(conv=moved)}
    check_same(*(holds.matches_reference(kernel("prologue_gdn"), each) for each in (call, elsewhere)))


def test_every_tile_of_a_prologue_gives_the_same_bits(monkeypatch):
    call, results = make("prologue_gdn", B=2, T=65, HV=2, K=8), []
    for BT, num_warps in [(64, 4), (32, 4), (16, 2)]:
        config = prologue.PrologueConfig(max_dim=256, BT=BT, num_warps=num_warps, measured_on=NOT_MEASURED)
        monkeypatch.setattr(prologue, "PROLOGUE_CONFIGS", (config,))
        results.append(holds.matches_reference(kernel("prologue_gdn"), call))
    for one, other in itertools.pairwise(results):
        check_same(one, other)


def test_small_decays_are_kept():
    """Over many tokens they add up: 1e-7 a token at A = 1 is what softplus(-16) makes."""

    @triton.jit
    def function(p_x, p_y, N: tl.constexpr):
        o = tl.arange(0, N)
        tl.store(p_y + o, softplus(tl.load(p_x + o)))

    x = torch.tensor([-30.0, -16.0, -8.0, -1.0, 0.0, 5.0, 19.9, 20.1, 90.0])
    x = torch.cat([x, x[:7]])
    y = torch.empty_like(x)
    function[(1,)](x, y, N=16)
    assert torch.allclose(y.double(), torch.nn.functional.softplus(x.double()), rtol=1e-6, atol=0)


def norm_call(family, **sizes):
    spec = {n: x for n, x in FAMILIES[family][1].items() if n in ("gate", "norm_in_fp32")}
    return registry.ops()["gated_norm"].make_inputs(HK=2, K=8, **spec, **sizes)


def test_the_norm_rounds_as_plain_pytorch_does():
    """In bf16 the eager norm, which keeps the families' roundings, gives the same bits in all but a few places."""
    for family in ("qwen3_next", "kimi_linear"):
        call = norm_call(family, B=2, T=67, HV=4, V=32, dtype=torch.bfloat16)
        same = (kernel("gated_norm").fn(**call) == eager_norm(**call)).double().mean()
        assert same > 0.98, f"{family}: {same:.3f} of the numbers are the same"


def test_the_norm_of_zeros_and_large_numbers_is_finite():
    call = norm_call("qwen3_next", B=2, T=3, HV=6, V=40)
    for o in (torch.zeros_like(call["o"]), 1e15 * call["o"]):
        assert torch.isfinite(kernel("gated_norm").fn(**{**call, "o": o})).all()


# ------------------------------------------------------------------------------------------------------------- chunks


def check_beside_plain_pytorch(op, call):
    """Each result is at most twice as far from the oracle as plain PyTorch with the same roundings."""
    got, exact = calls.run(kernel(op), call), calls.reference(op, call)
    for (name, x), y in zip(got.items(), rounded_chunks(**call), strict=True):
        assert_no_worse(name, x, y, exact[name])


@both_chunks
@every_dtype
def test_error_is_at_most_twice_plain_pytorchs(op, dtype):
    check_beside_plain_pytorch(op, make(op, T=130, HV=2, K=32, V=32, dtype=dtype))


@every_dtype
@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["equal", "similar"])
@both_chunks
def test_the_inverse_rounds_no_more_than_pytorch(op, noise, beta, dtype):
    """Keys that resemble each other multiply every rounding inside the inverse; plain PyTorch solves in fp32, row by
    row."""
    call = make(op, T=130, HV=2, K=32, V=32, dtype=dtype)
    k = torch.nn.functional.normalize(noise * call["k"].double() + call["k"][:, :1].double(), dim=-1)
    call |= dict(k=k.to(dtype), g=0.1 * call["g"], beta=torch.full_like(call["beta"], beta))
    check_beside_plain_pytorch(op, call)


@both_chunks
@pytest.mark.parametrize(
    "lengths",
    [[*range(1, 131, 16), 63, 64, 66, 127, 128, 130], pytest.param(range(1, 131), marks=pytest.mark.extended)],
    ids=["some", "every"],
)
def test_every_length(op, lengths):
    """From 1 to 130 tokens, packed in one call, since packed is separate to the bit."""
    lengths = torch.tensor(lengths)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    call = make(op, T=int(bounds[-1]), state=False)
    states = make(op, T=1, B=len(lengths))["initial_state"]
    got = calls.run(kernel(op), {**call, "initial_state": states, "cu_seqlens": bounds})
    for n, (first, last) in enumerate(itertools.pairwise(bounds.tolist())):
        part = calls.tokens(op, {**call, "initial_state": states[n : n + 1]}, slice(first, last))
        found = {"o": got["o"][:, first:last], "final_state": got["final_state"][n : n + 1]}
        for name, wanted in calls.reference(op, part).items():
            assert_close(f"{name} of {last - first} tokens", found[name], wanted, budget(op, torch.float32, name))


# ---------------------------------------------------------------- chunks of KDA that one product serves, and wider ones


def spread(call: calls.Call, share: float) -> calls.Call:
    """The call with gates of which every channel decays by a share of `WIDEST` from a chunk's first row to its last."""
    g = -0.1 - torch.rand(call["g"].shape, generator=torch.Generator().manual_seed(2))
    for first in range(0, g.shape[1], 64):
        rows = g[:, first + 1 : first + 64]
        rows *= -share * WIDEST[call["v"].dtype] / rows.sum(1, keepdim=True)
    return {**call, "g": g}


@pytest.fixture
def ranges(monkeypatch):
    """Ranges ``[chunks, HV]`` of every call, by which the kernels decide how a chunk is served."""
    seen = []

    class Spy:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda **kwargs: seen.append(kwargs["p_range"]) or self.kernel[grid](**kwargs)

    monkeypatch.setattr(chunk_kda, "prepare_kernel", Spy(chunk_kda.prepare_kernel))
    return seen


def kda(share, dtype=torch.float32, **sizes):
    return spread(make("chunk_kda", dtype=dtype, **sizes), share)


def both_kinds(dtype, B=1, K=48):
    """A call of four chunks, the last one short, and two heads, and which ``[B * chunks, HV]`` of them are wide."""
    call = kda(0.5, dtype, B=B, T=212, HV=2, K=K)
    call["g"][0, 64 + 1 : 128, 0] *= 4  # a whole chunk of one head
    call["g"][0, 192 + 9, 1, -1] = -2 * WIDEST[dtype]  # one channel of the last tile, in the short chunk
    call["g"][0, 128 + 63, 1, 0] = -1e4  # one channel of the first tile, at the chunk's end
    wide = torch.zeros(B * 4, 2, dtype=torch.bool)
    wide[1, 0] = wide[2, 1] = wide[3, 1] = True
    return call, wide


@every_dtype
@pytest.mark.parametrize("share", [0.5, 0.999, 1.001, 3.0])
def test_ranges_just_inside_and_just_outside(ranges, dtype, share):
    holds.matches_reference(kernel("chunk_kda"), kda(share, dtype, T=128, HV=2, K=48))
    assert ((ranges[0] > -WIDEST[dtype]) == (share < 1)).all(), ranges[0]
    assert torch.allclose(ranges[0], torch.tensor(-share * WIDEST[dtype]), rtol=1e-5)


@every_dtype
def test_error_at_the_widest_is_at_most_twice_plain_pytorchs(dtype):
    check_beside_plain_pytorch("chunk_kda", kda(0.999, dtype, T=130, HV=2, K=32, V=32))


@every_dtype
@pytest.mark.parametrize("l2norm", [False, True], ids=["asis", "l2norm"])
def test_chunks_of_both_kinds_side_by_side(ranges, dtype, l2norm):
    call, wide = both_kinds(dtype)
    if l2norm:
        call["k"][:, 70] = 0  # a row that cannot be normalised
        call |= dict(q=5 * call["q"], k=7 * call["k"], qk_l2norm=True)
    holds.matches_reference(kernel("chunk_kda"), call)
    assert torch.equal(ranges[0] <= -WIDEST[dtype], wide)


def test_the_kind_of_a_chunk_does_not_depend_on_what_is_beside_it():
    """The same bits alone and in a batch, and a head alone and among others."""
    call, _ = both_kinds(torch.bfloat16, B=2)
    call["g"][1] = 3 * call["g"][1].flip(1)
    holds.batched_equals_single(kernel("chunk_kda"), call)
    whole = calls.run(kernel("chunk_kda"), call)
    for h in range(2):
        one = {**call, **{n: call[n][:, :, h : h + 1] for n in ("v", "g", "beta")}}
        one["initial_state"] = call["initial_state"][:, h : h + 1]
        alone = calls.run(kernel("chunk_kda"), one)
        check_same(alone, {"o": whole["o"][:, :, h : h + 1], "final_state": whole["final_state"][:, h : h + 1]})


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("share", [0.9, 1.1], ids=["narrow", "wide"])
def test_lengths_of_narrow_and_wide_chunks(ranges, T, share):
    for dtype in (torch.float32, torch.bfloat16):
        holds.matches_reference(kernel("chunk_kda"), kda(share, dtype, T=T, K=20))
        assert ((ranges[-1][0] > -WIDEST[dtype]) == (share < 1 or T == 1)).all()


@every_dtype
def test_packed_chunks_of_both_kinds(dtype):
    call, _ = both_kinds(dtype, K=16)
    call |= dict(initial_state=None, cu_seqlens=torch.tensor([0, 1, 66, 66, 83, 147, 212]))
    holds.packed_equals_separate(kernel("chunk_kda"), call)
    holds.matches_reference(kernel("chunk_kda"), call)


@every_dtype
@pytest.mark.parametrize("share", [0.999, 1.1], ids=["narrow", "wide"])
def test_large_queries_and_keys(dtype, share):
    """30 times as long, with beta so much smaller that the state does not grow: factors reach 30 e^60."""
    call = kda(share, dtype, T=130, K=32)
    call |= dict(q=30 * call["q"], k=30 * call["k"], beta=call["beta"].float() / 900)
    holds.matches_reference(kernel("chunk_kda"), call)


@every_dtype
@pytest.mark.parametrize("gate", [-200.0, -1e4, float("-inf")])
@pytest.mark.parametrize("row", [0, 1, 2, 37, 63])
def test_a_chunk_forgets_everything_at_one_row(ranges, dtype, gate, row):
    """What is before the row is gone, small decays around it count in full. At its first row the chunk stays narrow."""
    call = kda(0.5, dtype, T=130, K=20)
    call["g"][:, 64 + row] = gate
    holds.matches_reference(kernel("chunk_kda"), call)
    assert (ranges[0] > -WIDEST[dtype]).flatten().tolist() == [True, row == 0, True]


# ----------------------------------------------------------------------------------------- long sequences in segments


@pytest.fixture
def cut(monkeypatch):
    """``cut(count, minimum)``: from now on sequences of `minimum` tokens are cut into `count` segments."""

    def cut(count: int, minimum: int = 128) -> None:
        config = segmented_scan.SegmentsConfig(max_columns=float("inf"), segments=count, measured_on=NOT_MEASURED)
        monkeypatch.setattr(segmented_scan, "SEGMENTS_CONFIGS", (config,))
        monkeypatch.setattr(segmented_scan, "MINIMUM", minimum)

    return cut


def slow(op, factor=0.02, **sizes):
    """A call with so little decay that what is before a segment matters in it."""
    call = make(op, **sizes)
    return {**call, "g": factor * call["g"]}


counts = pytest.mark.parametrize("count", [2, 4, 8])
SHAPES = {
    "no_more_chunks_than_segments": dict(T=128),
    "some_segments_are_empty": dict(T=577, state=False),  # ten chunks: with 8 segments the last three
    "odd_dims": dict(B=2, T=330, K=20, V=36),
    "float16": dict(T=260, HV=2, V=20, dtype=torch.float16),
    "bfloat16": dict(B=2, T=330, K=32, dtype=torch.bfloat16, state=False),
    "wide_keys": dict(T=200, K=64, dtype=torch.bfloat16),
}


@both_chunks
@counts
@pytest.mark.parametrize("shape", SHAPES)
def test_segments_match_the_reference(op, count, shape, cut):
    cut(count)
    holds.matches_reference(kernel(op), slow(op, **SHAPES[shape]))


@both_chunks
@pytest.mark.parametrize("T", [1000, 4097])
def test_a_long_sequence_uncut(op, T, monkeypatch):
    monkeypatch.setattr(segmented_scan, "MULTIPROCESSORS", 1)
    holds.matches_reference(kernel(op), slow(op, 0.1, T=T))


@both_chunks
def test_a_long_sequence_as_a_card_cuts_it(op):
    """One head, the table's own row and minimum."""
    holds.matches_reference(kernel(op), slow(op, 0.01, T=4097, state=False))


GATES = [change.gate_none, change.gate_some, change.gate_mixed, change.gate_all, change.gate_average(6.0)]
CHANGES = [*map(change.gated, GATES), change.beta_two_without_decay, change.l2norm]


@both_chunks
@pytest.mark.parametrize(
    ("altered", "dtype"),
    [*itertools.product(CHANGES, [torch.bfloat16]), *itertools.product((CHANGES[0], CHANGES[5]), DTYPES)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_error_in_segments_is_at_most_twice_the_uncut(op, altered, dtype, cut):
    call = altered(make(op, T=270, K=32, dtype=dtype))
    cut(1)
    uncut, exact = calls.run(kernel(op), call), calls.reference(op, call)
    cut(4)
    factor = HARD_CALLS if altered is change.beta_two_without_decay else 1
    for name, x in holds.matches_reference(kernel(op), call, factor=factor).items():
        assert_no_worse(name, x, uncut[name], exact[name])


@both_chunks
def test_equal_keys_in_segments(op, cut):
    cut(4)
    call = change.equal_keys(slow(op, 2.0, T=330, K=32))
    holds.matches_reference(kernel(op), call)


@both_chunks
@counts
def test_segments_keep_the_whole_history(op, count, cut):
    """What nothing forgets or overwrites in the first segment's state is in the last one's, to the bit."""
    cut(count)
    call = slow(op, 0.0, T=400)
    call["k"][..., 0] = 0
    call["initial_state"][:] = 0
    call["initial_state"][:, :, 0] = torch.arange(1, 17.0)
    assert_same("row 0", kernel(op).fn(**call)[1][:, :, 0], call["initial_state"][:, :, 0])


@both_chunks
@pytest.mark.parametrize(("count", "state"), [(2, True), (8, False)], ids=["2", "8-nostate"])
def test_packed_segments_equal_separate_ones(op, count, state, cut):
    """Sequences that are empty, of one token, shorter than the minimum, and cut, whole chunks and not."""
    cut(count, 192)
    bounds = [0, *itertools.accumulate([0, 1, 191, 323, 0, 64, 192, 512, 130])]
    index = torch.int32 if state else torch.int64
    call = change.packed(*bounds, state=state, index=index)(slow(op, T=bounds[-1]))
    holds.matches_reference(kernel(op), call)
    holds.packed_equals_separate(kernel(op), call)


@both_chunks
def test_more_packed_sequences_than_may_be_long(op, cut):
    """Slots are for T // MINIMUM sequences, and those that need them are found among many."""
    cut(4, 128)
    bounds = [0, *itertools.accumulate([1] * 12 + [129] + [3] * 6 + [200])]
    call = change.packed(*bounds, state=False)(slow(op, T=bounds[-1]))
    holds.matches_reference(kernel(op), call)
    holds.packed_equals_separate(kernel(op), call, only=[12, 19])


@both_chunks
def test_segments_never_ask_the_host(op, cut):
    cut(4)
    holds.host_never_asked(kernel(op), change.packed(0, 1, 200, state=False)(make(op, T=200)))


@both_chunks
def test_batched_segments_equal_single_ones_and_runs_repeat(op, cut):
    cut(4)
    call = slow(op, B=2, T=270, dtype=torch.bfloat16)
    holds.same_bits(kernel(op), call)
    holds.inputs_untouched(kernel(op), call)
    holds.batched_equals_single(kernel(op), call)


@both_chunks
@pytest.mark.parametrize("at", [1, 128, 205])
def test_segments_split_anywhere_equal_the_whole(op, at, cut):
    cut(4)
    holds.split_equals_whole(kernel(op), slow(op, T=330, K=32), sizes=[at, 330 - at])


@pytest.mark.parametrize(
    ("multiprocessors", "counts"),
    [
        pytest.param(132, {1: 16, 2: 16, 4: 8, 8: 4, 16: 1, 32: 1}, id="h200"),
        pytest.param(108, {1: 16, 2: 8, 4: 4, 8: 1, 32: 1}, id="a100"),
        pytest.param(24, {1: 4, 2: 1}, id="small"),
    ],
)
def test_segments_by_heads_and_card(multiprocessors, counts, monkeypatch):
    monkeypatch.setattr(segmented_scan, "MULTIPROCESSORS", multiprocessors)
    assert {HV: segmented_scan.segment_count(HV, 128, torch.device("cpu")) for HV in counts} == counts
