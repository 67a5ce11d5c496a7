"""The access checker finds each kind of fault, planted in small kernels, and nothing in a kernel without one."""

import pytest
import torch

from hf_gdn.kernels.triton.runtime import INTERPRET, tl, triton

pytestmark = [pytest.mark.interpret, pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")]


@triton.jit
def _copy(p_x, p_y, N, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(p_y + o_n, tl.load(p_x + o_n, mask=o_n < N), mask=o_n < N)


@triton.jit
def _outside(p_x, p_y, N, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(p_y + o_n, tl.load(p_x + o_n + 1, mask=o_n < N), mask=o_n < N)


@triton.jit
def _all_write(p_x, p_y, N, BN: tl.constexpr):
    o_n = tl.arange(0, BN)
    tl.store(p_y + o_n, tl.load(p_x + o_n, mask=o_n < N), mask=o_n < N)


@triton.jit
def _reads_its_neighbour(p_x, p_y, N, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    other = tl.load(p_y + (o_n + BN) % N, mask=o_n < N)
    tl.store(p_y + o_n, other, mask=o_n < N)


@triton.jit
def _reread(p_x, p_y, N, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(p_y + o_n, tl.load(p_x + o_n, mask=o_n < N), mask=o_n < N)
    tl.store(p_y + o_n, tl.load(p_y + o_n, mask=o_n < N) + 1, mask=o_n < N)


@triton.jit
def _reread_after_a_barrier(p_x, p_y, N, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(p_y + o_n, tl.load(p_x + o_n, mask=o_n < N), mask=o_n < N)
    tl.debug_barrier()
    tl.store(p_y + o_n, tl.load(p_y + o_n, mask=o_n < N) + 1, mask=o_n < N)


@triton.jit
def _overwrite(p_x, p_y, N, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    reversed_n = tl.program_id(0) * BN + BN - 1 - tl.arange(0, BN)
    x = tl.load(p_y + reversed_n, mask=reversed_n < N)
    tl.store(p_y + o_n, x, mask=o_n < N)


@triton.jit
def _atomics(p_x, p_y, N, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.atomic_add(p_y + o_n % BN, tl.load(p_x + o_n, mask=o_n < N), mask=o_n < N)


@triton.jit
def _atomic_and_load(p_x, p_y, N, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.atomic_add(p_y + o_n % BN, tl.load(p_x + o_n, mask=o_n < N), mask=o_n < N)
    tl.store(p_x + o_n, tl.load(p_y + (o_n + 1) % BN), mask=o_n < N)


@pytest.fixture
def checker(access_checker):
    yield access_checker
    access_checker.findings.clear()  # planted ones, which fail no test


@pytest.mark.parametrize(
    "kernel, kinds",
    [
        (_copy, set()),
        (_outside, {"outside"}),
        (_all_write, {"conflict"}),
        (_reads_its_neighbour, {"conflict"}),
        (_reread, {"reread"}),
        (_reread_after_a_barrier, set()),
        (_overwrite, {"overwrite"}),
        (_atomics, set()),
        (_atomic_and_load, {"conflict"}),
    ],
    ids=lambda x: getattr(x, "__name__", "").strip("_") or None,
)
def test_planted_faults_are_found(checker, kernel, kinds):
    x, y = torch.arange(16.0), torch.zeros(16)
    kernel[(4,)](x, y, 16, BN=4)
    assert {kind for name, kind in checker.findings if name == kernel.__name__} == kinds


def test_views_of_one_storage_are_told_apart(checker):
    """Memory between the elements of a tensor's extent belongs to it; memory before and behind does not."""
    whole = torch.arange(32.0)
    _copy[(1,)](whole[8:12], torch.zeros(4), 4, BN=4)
    assert not checker.findings
    _outside[(1,)](whole[8:12], torch.zeros(4), 4, BN=4)
    assert ("_outside", "outside") in checker.findings


def test_tensors_of_other_element_sizes_may_not_overlap(checker):
    x = torch.arange(4.0)
    _copy[(1,)](x, x.view(torch.float16), 4, BN=4)
    assert ("_copy", "alias") in checker.findings
