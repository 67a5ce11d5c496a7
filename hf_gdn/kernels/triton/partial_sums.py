"""Sums over all tokens in a fixed order: programs write partial sums, and a second launch adds these up.

Gradients of weights are such sums. There are no float atomics, whose order changes from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .prepared import launch
from .runtime import NOT_MEASURED, LaunchConfig, cdiv, on_device, tl, triton


@dataclass(frozen=True, kw_only=True)
class SumConfig(LaunchConfig):
    """Launch parameters of a sum: BP partial sums per step, BN columns per program."""

    BP: int
    BN: int


SUM_CONFIG = SumConfig(BP=32, BN=64, num_warps=4, measured_on=NOT_MEASURED)


@triton.jit
def column_sums(p_partials, rows, columns, o_n, m_n, BP: tl.constexpr, BN: tl.constexpr):
    """Sums of some columns of ``[rows, columns]``, ``[BN]`` in fp32."""
    b_sum = tl.zeros([BP, BN], tl.float32)
    for i_p in range(0, rows, BP):
        o_p = i_p + tl.arange(0, BP)
        m = (o_p < rows)[:, None] & m_n[None, :]
        b_sum += tl.load(p_partials + o_p.to(tl.int64)[:, None] * columns + o_n[None, :], mask=m, other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(
    p_partials,  # [rows, columns] in fp32
    p_sum,  # [columns]
    rows,
    columns,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < columns
    b_sum = column_sums(p_partials, rows, columns, o_n, m_n, BP, BN)
    tl.store(p_sum + o_n, b_sum.to(p_sum.dtype.element_ty), mask=m_n)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the rows of contiguous fp32 partial sums ``[rows, columns]``, rounded once to `dtype`."""
    rows, columns = partials.shape
    found = torch.empty(columns, dtype=dtype, device=partials.device)
    with on_device(partials):
        launch(
            _sum_kernel,
            (cdiv(columns, SUM_CONFIG.BN),),
            p_partials=partials,
            p_sum=found,
            rows=rows,
            columns=columns,
            BP=SUM_CONFIG.BP,
            BN=SUM_CONFIG.BN,
            num_warps=SUM_CONFIG.num_warps,
        )
    return found
