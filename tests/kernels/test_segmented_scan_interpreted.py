"""The scan in segments, in Triton's interpreter (TRITON_INTERPRET=1): exact, and the same bits whatever else is served.

Bounds are those of test_chunk_interpreted.py, which derives them: C_s and M_s of a segment are made by the roundings of
the scan itself, and the merge, in fp32 (tf32x3 on a card: 3.5e-7), adds none that count. Keys are unit vectors and beta
is at most 2, so that M_s lengthens nothing and errors do not grow on the way. Where nothing decays M_s matters most.
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")
from hf_gdn.kernels.triton.runtime import INTERPRET, NOT_MEASURED

if not INTERPRET:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from hf_gdn.kernels.triton import segmented_scan

from .test_chunk_interpreted import (
    BOUND,
    OPS,
    Shape,
    both_ops,
    check,
    compare,
    error,
    gate_all,
    gate_average,
    gate_mixed,
    gate_none,
    gate_steps,
    make,
    oracle,
)

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.usefixtures("rounded_bf16"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

PER_TOKEN = ("q", "k", "v", "g", "beta")
counts = pytest.mark.parametrize("count", [2, 4, 8])


@pytest.fixture
def cut(monkeypatch):
    """``cut(count, minimum)``: from now on sequences of `minimum` tokens are cut into `count` segmented_scan."""

    def cut(count: int, minimum: int = 128) -> None:
        config = segmented_scan.SegmentsConfig(max_columns=float("inf"), segments=count, measured_on=NOT_MEASURED)
        monkeypatch.setattr(segmented_scan, "SEGMENTS_CONFIGS", (config,))
        monkeypatch.setattr(segmented_scan, "MINIMUM", minimum)

    return cut


def slow(call: dict, factor: float = 0.02) -> dict:
    """The call with so little decay that what is before a segment matters in it."""
    return dict(call, g=factor * call["g"])


SHAPES = [
    Shape(T=128),  # no more chunks than segments
    Shape(T=577, state=False),  # ten chunks: with 8 segments the last three are empty
    Shape(B=2, T=330, K=20, V=36),
    Shape(T=260, HK=1, HV=2, K=16, V=20, dtype=torch.float16),
    Shape(B=2, T=330, K=32, dtype=torch.bfloat16, state=False),
    Shape(T=200, K=64, V=16, dtype=torch.bfloat16),
]


@both_ops
@counts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(op, count, shape, cut):
    cut(count)
    check(op, slow(make(op, shape)))


@both_ops
@pytest.mark.parametrize("T", [1000, 4097])
def test_uncut(op, T, monkeypatch):
    monkeypatch.setattr(segmented_scan, "MULTIPROCESSORS", 1)
    check(op, slow(make(op, Shape(T=T)), 0.1))


@both_ops
def test_as_a_card_cuts(op):
    """One head, the table's own row and minimum."""
    check(op, slow(make(op, Shape(T=4097, state=False)), 0.01))


def l2norm(call: dict) -> dict:
    call["k"][:, 3] = 0  # a row that cannot be normalised
    return dict(call, q=call["q"] * 7, k=call["k"] * 5, qk_l2norm=True)


def gated(gate):
    def change(call: dict) -> dict:
        return dict(call, g=gate(call["g"], torch.Generator().manual_seed(1)))

    change.__name__ = gate.__name__
    return change


def beta_two(call: dict) -> dict:
    return dict(call, beta=2 * call["beta"], g=torch.zeros_like(call["g"]))


CHANGES = [*map(gated, (gate_none, gate_steps, gate_mixed, gate_all, gate_average(6.0))), beta_two, l2norm]


@both_ops
@pytest.mark.parametrize(
    ("change", "dtype"),
    [*itertools.product(CHANGES, [torch.bfloat16]), *itertools.product((CHANGES[0], beta_two), BOUND)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_error_like_uncut(op, change, dtype, cut):
    call = change(make(op, Shape(T=270, K=32, dtype=dtype)))
    expected = oracle(op, call)
    cut(1)
    uncut = OPS[op][1](**call)
    cut(4)
    for name, actual, x, e in zip(("o", "final_state"), check(op, call), uncut, expected, strict=True):
        # 1e-7: two ulp of fp32, since an error of zero cannot be doubled.
        assert error(actual, e) <= 2 * error(x, e) + 1e-7, f"{name}: {error(actual, e):.2e}, uncut {error(x, e):.2e}"


@both_ops
def test_equal_keys(op, cut):
    """The worst case of the inverse."""
    cut(4)
    call = slow(make(op, Shape(T=330, K=32)))
    call["k"][:] = call["k"][:, :1].clone()
    check(op, dict(call, beta=torch.ones_like(call["beta"])))


@both_ops
@counts
def test_whole_history_is_kept(op, count, cut):
    """What nothing forgets or overwrites in the first segment's state is in the last one's, to the bit."""
    cut(count)
    call = make(op, Shape(T=400, K=16))
    call["k"][..., 0] = 0
    call["initial_state"][:] = 0
    call["initial_state"][:, :, 0] = torch.arange(1, 17.0)
    final = OPS[op][1](**dict(call, g=torch.zeros_like(call["g"])))[1]
    assert torch.equal(final[:, :, 0], call["initial_state"][:, :, 0])


# Sequences that are empty, of one token, shorter than the minimum of 192, and cut, whole chunks and not.
LENGTHS = [0, 1, 191, 323, 0, 64, 192, 512, 130]


@both_ops
@pytest.mark.parametrize(("count", "state"), [(2, True), (8, False)], ids=["2", "8-nostate"])
def test_packed_equals_separate(op, count, state, cut):
    cut(count, 192)
    N, bounds = len(LENGTHS), torch.tensor([0, *LENGTHS]).cumsum(0)
    call = slow(make(op, Shape(T=sum(LENGTHS), state=False)))
    states = make(op, Shape(T=1, B=N))["initial_state"] if state else None
    packed = check(op, dict(call, initial_state=states, cu_seqlens=bounds.to(torch.int32 if state else torch.int64)))
    for n, (first, last) in enumerate(zip(bounds.tolist(), bounds[1:].tolist(), strict=False)):
        part = {x: call[x][:, first:last] for x in PER_TOKEN}
        o, final = OPS[op][1](**dict(call, **part, initial_state=states[n : n + 1] if state else None))
        assert torch.equal(packed[0][:, first:last], o), f"o of sequence {n}"
        assert torch.equal(packed[1][n : n + 1], final), f"final_state of sequence {n}"


@both_ops
def test_more_packed_sequences_than_may_be_long(op, cut):
    """Slots are for T // MINIMUM sequences, and those that need them are found among many."""
    cut(4, 128)
    lengths = [1] * 12 + [129] + [3] * 6 + [200]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    call = slow(make(op, Shape(T=sum(lengths), state=False)))
    o, final = check(op, dict(call, cu_seqlens=bounds))
    for n in (12, 19):
        part = {x: call[x][:, bounds[n] : bounds[n + 1]] for x in PER_TOKEN}
        one = OPS[op][1](**dict(call, **part))
        assert torch.equal(o[:, bounds[n] : bounds[n + 1]], one[0]) and torch.equal(final[n : n + 1], one[1])


@both_ops
def test_packed_never_asks_the_device(op, cut, monkeypatch):
    def refuse(*args):
        raise AssertionError("reads a tensor's values on the host")

    cut(4)
    call = dict(make(op, Shape(T=200, state=False)), cu_seqlens=torch.tensor([0, 1, 200]))
    for name in ("tolist", "item", "__int__", "__index__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    OPS[op][1](**call)


@both_ops
@pytest.mark.parametrize("count", [4])
def test_batched_equals_single_and_runs_repeat(op, count, cut):
    cut(count)
    call = slow(make(op, Shape(B=2, T=270, dtype=torch.bfloat16)))
    before = {n: x.clone() for n, x in call.items() if isinstance(x, torch.Tensor)}
    result = OPS[op][1](**call)
    assert all(torch.equal(x, y) for x, y in zip(result, OPS[op][1](**call), strict=True))
    assert all(torch.equal(call[n], x) for n, x in before.items())
    for b in range(2):
        one = {n: x[b : b + 1] if isinstance(x, torch.Tensor) else x for n, x in call.items()}
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(result, OPS[op][1](**one), strict=True))


@both_ops
@pytest.mark.parametrize("at", [1, 128, 205])
def test_split_anywhere_equals_whole(op, at, cut):
    cut(4)
    call = slow(make(op, Shape(T=330, K=32)))
    whole = OPS[op][1](**call)
    o_first, carried = OPS[op][1](**dict(call, **{n: call[n][:, :at] for n in PER_TOKEN}))
    o_rest, final = OPS[op][1](**dict(call, **{n: call[n][:, at:] for n in PER_TOKEN}, initial_state=carried))
    compare((torch.cat((o_first, o_rest), 1), final), whole, BOUND[torch.float32])


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
