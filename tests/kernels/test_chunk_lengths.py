"""Chunk kernels at every number of tokens from 1 to 130, the eager ones at 1000 and 4097, against the float64 oracle.

The eager kernels call by call; the Triton kernels, in the interpreter, all lengths packed in one call, since packed is
separate to the bit (tests/kernels/test_chunk_interpreted.py, which derives the budget of 1e-5 too); they see 1000 and
4097 tokens in tests/kernels/test_segmented_scan_interpreted.py.
"""

from itertools import pairwise

import pytest
import torch

from hf_gdn import registry
from hf_gdn.kernels.triton.runtime import INTERPRET
from tests.tiny import assert_close

BUDGET = 1e-5
both_ops = pytest.mark.parametrize("op", ["chunk_gdn", "chunk_kda"])


def make(op, T, **kwargs):
    return registry.ops()[op].make_inputs(T=T, HK=1, HV=1, K=16, V=16, **kwargs)


def oracle(op, call):
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    return registry.ops()[op].reference(**exact)


def compare(op, T, got, wanted):
    for name, one, other in zip(("o", "final_state"), got, wanted, strict=True):
        assert_close(f"{op} at T = {T}: {name}", one, other, BUDGET)


@both_ops
def test_eager_at_every_length(op):
    fn = registry.get(op, "eager").fn
    for T in range(1, 131):
        call = make(op, T, seed=T)
        compare(op, T, fn(**call), oracle(op, call))


@both_ops
@pytest.mark.parametrize("T", [1000, 4097])
def test_eager_at_length(op, T):
    call = make(op, T, seed=T)
    compare(op, T, registry.get(op, "eager").fn(**call), oracle(op, call))


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
@both_ops
def test_triton_at_every_length(op):
    lengths = torch.arange(1, 131)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    call = make(op, int(bounds[-1]), state=False)
    states = make(op, 1, B=len(lengths))["initial_state"]
    o, final = registry.get(op, "triton").fn(**dict(call, initial_state=states, cu_seqlens=bounds))
    for n, (first, last) in enumerate(pairwise(bounds.tolist())):
        part = {name: call[name][:, first:last] for name in ("q", "k", "v", "g", "beta")}
        wanted = oracle(op, dict(call, **part, initial_state=states[n : n + 1]))
        compare(op, last - first, (o[:, first:last], final[n : n + 1]), wanted)
