"""The triangular inverse of a chunk on tensor cores, by doubling blocks.

    A = (diag(1 / beta) - M)^-1 ,  M [64, 64] lower triangular

Without M, this is diag(beta). If A is correct inside the blocks of w rows along the diagonal, then

    A <- A + Y A ,  Y = A M, of which only the blocks that join two adjacent blocks are kept

is correct inside blocks of 2 w rows, because the block below the diagonal of the inverse is A_22 M_21 A_11. Six such
steps go from 1 to 64 rows. They are as stable as substitution: each product is a block of the result or half of one. In
contrast, the powers of M that a Neumann series sums reach thousands for equal keys. Nothing is divided by beta, and the
diagonal of M is not used.

Up to 16 rows, each warp inverts its own blocks in registers. The accumulator of a transposed matrix already has the
layout of the next product's right operand, so A and its transpose are both updated and no data are exchanged.
"""

from __future__ import annotations

import torch

from .math import dot
from .runtime import tl, triton

# Dtype of the products' operands, by dtype of the inputs. fp16 inputs need more than the 11 bits of fp16.
OPERANDS = {torch.bfloat16: tl.float16, torch.float16: tl.float32, torch.float32: tl.float32}


@triton.jit
def halves(b_x):
    """[64, 64] in tiles ``[32, 32]``: upper left, lower right, lower left."""
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_x, [2, 32, 2, 32]), [1, 3, 0, 2]))
    b_0, b_10 = tl.split(b_left)
    _, b_1 = tl.split(b_right)
    return b_0, b_1, b_10


@triton.jit
def store_halves(p_x, stride, b_0, b_1, b_10, rows):
    """Store lower triangular tiles in the first `rows` rows of ``[64, 64]``, with zeros in the upper right tile."""
    o_i = tl.arange(0, 32)
    dtype = p_x.dtype.element_ty
    p_x += o_i[:, None] * stride + o_i[None, :]
    m_0, m_1 = (o_i < rows)[:, None], (o_i + 32 < rows)[:, None]
    tl.store(p_x, b_0.to(dtype), mask=m_0)
    tl.store(p_x + 32, tl.zeros([32, 32], dtype), mask=m_0)
    tl.store(p_x + 32 * stride, b_10.to(dtype), mask=m_1)
    tl.store(p_x + 32 * stride + 32, b_1.to(dtype), mask=m_1)


@triton.jit
def invert_halves(b_m0, b_m1, b_m10, b_beta, DTYPE: tl.constexpr):
    """A in three tiles ``[32, 32]`` fp32: upper left, lower right, lower left (the upper right one is zero).

    Args:
        b_m0, b_m1, b_m10: the same tiles of M in DTYPE.
        b_beta: ``[64]`` fp32.
        DTYPE: dtype of the products' operands. fp16 has three bits more than bf16, whose rounding loses a decimal digit
            if keys are similar, and its range is sufficient: entries of A do not grow more than the state does.
    """
    b_beta0, b_beta1 = tl.split(tl.permute(tl.reshape(b_beta, [2, 32]), [1, 0]))
    b_a0 = _invert_32(b_m0, b_beta0, DTYPE)
    b_a1 = _invert_32(b_m1, b_beta1, DTYPE)
    b_y = dot(b_a1.to(DTYPE), b_m10, PRECISION="ieee").to(DTYPE)
    return b_a0, b_a1, dot(b_y, b_a0.to(DTYPE), PRECISION="ieee")


@triton.jit
def _invert_32(b_m, b_beta, DTYPE: tl.constexpr):
    o_i = tl.arange(0, 32)
    o_b = tl.arange(0, 2)
    m_same = (o_i[:, None] // 16) == (o_i[None, :] // 16)
    b_blocks = tl.sum(tl.reshape(tl.where(m_same, b_m, 0.0), [2, 16, 2, 16]), 2)
    b_blocks = _invert_16(b_blocks.to(tl.float32), tl.reshape(b_beta, [2, 16]), DTYPE)
    # Reshaping instead of indexing with None keeps the accumulator's layout, so the expansion is free.
    b_blocks = tl.reshape(b_blocks, [2, 16, 1, 16])
    b_a = tl.where(o_b[:, None, None, None] == o_b[None, None, :, None], b_blocks, 0.0)
    b_a = tl.reshape(b_a, [32, 32])
    b_y = dot(b_a.to(DTYPE), b_m, PRECISION="ieee")
    b_y = tl.where((o_i[:, None] >= 16) & (o_i[None, :] < 16), b_y, 0.0).to(DTYPE)
    return dot(b_y, b_a.to(DTYPE), b_a, PRECISION="ieee")


@triton.jit
def _invert_16(b_m, b_beta, DTYPE: tl.constexpr):
    """Invert two blocks at once: b_m ``[2, 16, 16]``, b_beta ``[2, 16]``, both fp32."""
    o = tl.arange(0, 16)
    o_i, o_j = o[None, :, None], o[None, None, :]
    m_lower = o_i > o_j
    o_apart = o_i ^ o_j  # its highest bit is the step at which two rows enter the same block
    b_mt = tl.permute(b_m, [0, 2, 1])
    b_betas = b_beta[:, :, None] * b_beta[:, None, :]
    b_diagonal = tl.where(o_i == o_j, b_beta[:, :, None], 0.0)
    b_a = tl.where((o_apart == 1) & m_lower, b_m * b_betas, b_diagonal)
    b_at = tl.where((o_apart == 1) & (o_i < o_j), b_mt * b_betas, b_diagonal)
    b_m = b_m.to(DTYPE)
    for step in tl.static_range(1, 4):
        b_y = dot(b_a.to(DTYPE), b_m, PRECISION="ieee")
        b_y = tl.where(((o_apart >> step) == 1) & m_lower, b_y, 0.0).to(DTYPE)
        b_left = b_at.to(DTYPE)
        b_a = dot(b_y, tl.permute(b_left, [0, 2, 1]), b_a, PRECISION="ieee")
        if step < 3:
            b_at = dot(b_left, tl.permute(b_y, [0, 2, 1]), b_at, PRECISION="ieee")
    return b_a
