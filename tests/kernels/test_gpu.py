"""What only a GPU can show: CUDA graphs, a second device, no waiting for it, segments as the card's table cuts them.

The invariants at real shapes are in tests/kernels/test_cases.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_gdn import registry
from hf_gdn.kernels.triton import segmented_scan, tokens
from hf_gdn.kernels.triton.chunk_kda_prepare import WIDEST
from hf_gdn.testing import assert_close, assert_no_worse, assert_same, calls
from hf_gdn.testing import invariants as holds
from hf_gdn.testing.call_changes import packed
from hf_gdn.testing.case import DTYPES, FAMILIES, HALF
from hf_gdn.testing.real_cases import LAYERS
from hf_gdn.testing.tolerances import budget

pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_chunks = pytest.mark.parametrize("op", ["chunk_gdn", "chunk_kda"])
both_recurrent = pytest.mark.parametrize("op", ["recurrent_gdn", "recurrent_kda"])


def kernel(op):
    return registry.get(op, "triton")


def make(op, layer="qwen3_next", **sizes):
    HK, HV, K, V = LAYERS["equal_heads" if op in ("chunk_kda", "step_kda") else layer]
    return registry.ops()[op].make_inputs(**{"HK": HK, "HV": HV, "K": K, "V": V, "device": "cuda", **sizes})


def check_same(got: calls.Results, wanted: calls.Results):
    for name, x in wanted.items():
        assert_same(name, got[name], x)


def run_without_sync(op, call):
    """Results of a call that never waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return calls.run(kernel(op), call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------------------------- chunks


@every_dtype
@pytest.mark.parametrize("share", [0.5, 0.999, 1.001])
def test_kda_chunks_of_both_kinds(dtype, share):
    """Every channel of a chunk decays by a share of what one product holds, in every third head by thrice that."""
    call = make("chunk_kda", T=1000, dtype=dtype, decay=1.0)
    for first in range(0, 1000, 64):
        rows = call["g"][:, first + 1 : first + 64]
        rows *= -share * WIDEST[dtype] / rows.sum(1, keepdim=True)
    call["g"][:, :, ::3] *= 3
    holds.matches_reference(kernel("chunk_kda"), call)


@both_chunks
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_packed_chunks_equal_separate_ones_without_a_sync(op, dtype):
    call = packed(0, 0, 1, 65, 65, 577, 1000, 1000, index=torch.int32)(make(op, T=1000, dtype=dtype))
    run_without_sync(op, call)
    # A tile of another width may add up in another order: rounding of the dtype, not bits.
    holds.packed_equals_separate(kernel(op), call, apart=budget(op, dtype, "o"))


@both_chunks
def test_many_sequences(op):
    """More sequences than grid axes y and z take programs."""
    call = make(op, T=3000, HK=4, HV=32, K=32, V=32, dtype=torch.bfloat16, state=False)
    got = calls.run(kernel(op), {**call, "cu_seqlens": torch.arange(3001, device="cuda")})
    rows = {name: call[name].transpose(0, 1) for name in calls.SIGNATURES[op].per_token}
    wanted = calls.run(kernel(op), {**call, **rows})
    assert_close("o", got["o"], wanted["o"].transpose(0, 1), budget(op, torch.bfloat16, "o"))
    assert_close("final_state", got["final_state"], wanted["final_state"], budget(op, torch.bfloat16, "final_state"))


@both_chunks
def test_fp32_chunks_are_at_most_twice_as_far_off_as_plain_pytorch(op):
    call = make(op, T=512)
    exact = calls.reference(op, call)["o"]
    assert_no_worse("o", *(registry.get(op, backend).fn(**call)[0] for backend in ("triton", "eager")), exact)


def few(op, HV=2, decay=0.01, **sizes):
    """So few heads that they are cut, and so little decay that what is before a segment matters in it."""
    assert segmented_scan.segment_count(HV, 128, torch.device("cuda")) > 1, "this card does not cut so many heads"
    return make(op, **{"HK": 1, "HV": HV, "decay": decay, **sizes})


@both_chunks
@every_dtype
@pytest.mark.parametrize(("T", "HV"), [(4096, 1), (4097, 2), (6000, 4)])
def test_segments_match_the_reference(op, dtype, T, HV):
    holds.matches_reference(kernel(op), few(op, HV, T=T, dtype=dtype))


@both_chunks
@every_dtype
def test_error_in_segments_is_at_most_twice_the_uncut(op, dtype, monkeypatch):
    call = few(op, T=8192, dtype=dtype, decay=0.0)
    got, exact = calls.run(kernel(op), call), calls.reference(op, call)
    monkeypatch.setattr(segmented_scan, "SEGMENTS_CONFIGS", ())
    for name, uncut in calls.run(kernel(op), call).items():
        assert_no_worse(name, got[name], uncut, exact[name])


@both_chunks
@every_dtype
def test_packed_and_batched_segments_equal_separate_ones(op, dtype):
    bounds = [0, *itertools.accumulate([0, 1, 4095, 4500, 0, 64, 4096])]
    call = packed(*bounds, index=torch.int32)(few(op, T=bounds[-1], dtype=dtype))
    run_without_sync(op, call)
    holds.packed_equals_separate(kernel(op), call)
    call = few(op, B=3, T=4200, dtype=dtype)
    holds.same_bits(kernel(op), call)
    holds.batched_equals_single(kernel(op), call, parts=[slice(1, 2)])


@both_chunks
def test_a_captured_graph_serves_other_lengths(op):
    call = few(op, T=9000, dtype=torch.bfloat16, state=False)
    bounds = torch.tensor([0, 4500, 9000], dtype=torch.int32, device="cuda")
    call |= dict(cu_seqlens=bounds)
    kernel(op).fn(**call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls.run(kernel(op), call)
    bounds.copy_(torch.tensor([0, 100, 9000], dtype=torch.int32))
    graph.replay()
    check_same(captured, calls.run(kernel(op), call))


# ----------------------------------------------------------------------------------------------------- token by token


def test_the_batches_of_the_cases_reach_every_tile():
    """Those of "many_heads": 160 sequences of 32 heads, and the parts of 1 and 32."""
    used = {tokens.tile_config(B * 32, 128, 128) for B in (1, 32, 160)}
    assert len(used) == len(tokens.TOKEN_CONFIGS)


@both_recurrent
def test_the_recurrent_rule_on_another_device(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    got = holds.matches_reference(kernel(op), make(op, T=2, dtype=torch.bfloat16, device="cuda:1"))
    assert got["o"].device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0


def test_a_step_writes_nothing_beside_its_states():
    """Rows before and after those of the call stay what they are."""
    call = make("step_gdn", B=3, T=2, dtype=torch.bfloat16)
    room = {}
    for name in ("conv_state", "state"):
        room[name] = torch.full_like(call[name].repeat(3, *(1,) * (call[name].dim() - 1)), torch.nan)
        room[name][3:6] = call[name]
    kernel("step_gdn").fn(**{**call, **{name: x[3:6] for name, x in room.items()}})
    for x in room.values():
        assert x[:3].isnan().all() and x[6:].isnan().all() and x[3:6].isfinite().all()


def test_a_captured_step_moves_the_same_states_on():
    call = make("step_kda", B=2, T=1, dtype=torch.bfloat16, **FAMILIES["kimi_linear"][1])
    states, again = ({name: call[name].clone() for name in ("conv_state", "state")} for _ in range(2))
    wanted = [kernel("step_kda").fn(**{**call, **states}) for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel("step_kda").fn(**{**call, **again})
    for want in wanted:
        graph.replay()
        assert_same("y", y, want)
    check_same(again, states)
