"""Helpers of the token-by-token kernels: the delta rule for one token, and launch parameters.

A program processes BV columns of a state [K, V], which are independent, and keeps them in registers over all tokens.

Bits do not depend on the batch, the tile or how tokens are divided among calls: every sum over K is the same binary
tree for any distribution of rows over threads (`sum_rows`), and products are fused with additions only explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass

from .math import sum_rows
from .runtime import LaunchConfig, next_power_of_2, tl, triton

# Off, because which products the compiler fuses with additions, and so the bits, depends on the tile.
FP_FUSION = False


@dataclass(frozen=True, kw_only=True)
class TokenConfig(LaunchConfig):
    """Launch parameters of a token-by-token kernel, for K up to 128.

    Args:
        max_heads: maximum N * HV for which this row is used.
        BV: columns of a state per program.
    """

    max_heads: int
    BV: int


_MEASURED_ON = "H200, a sketch of the recurrent kernel: T = 1, K = V = 128, 32 heads, batches of 1, 8, 32, 128 and 256"
# With few heads, narrow tiles give enough programs; with many heads, wide tiles give wide loads.
TOKEN_CONFIGS = (
    TokenConfig(max_heads=512, BV=16, num_warps=1, measured_on=_MEASURED_ON),
    TokenConfig(max_heads=2048, BV=32, num_warps=2, measured_on=_MEASURED_ON),
    TokenConfig(max_heads=2**31, BV=64, num_warps=4, measured_on=_MEASURED_ON),
)


def tile_config(heads: int, K: int, V: int) -> tuple[int, int]:
    """BV and the number of warps for `heads` = N * HV states of shape [K, V]."""
    config = next(config for config in TOKEN_CONFIGS if heads <= config.max_heads)
    # Above K = 128, half the columns, so that a thread holds as many state values as at 128.
    BV = config.BV if K <= 128 else config.BV // 2
    return min(BV, next_power_of_2(V)), config.num_warps


@triton.jit
def delta_rule_token(b_s, b_q, b_k, b_v, b_decay, b_beta, scale, BK: tl.constexpr, BV: tl.constexpr):
    """The delta rule for one token: the new state ``[BK, BV]`` and o ``[BV]``. The decay is scalar or ``[BK, 1]``."""
    b_s *= b_decay
    b_u = b_beta * (b_v - sum_rows(b_s * b_k[:, None], BK, BV))
    # An explicit fma for every tile size: without it, some tiles spill registers.
    b_s = tl.fma(b_k[:, None], b_u[None, :], b_s)
    return b_s, scale * sum_rows(b_s * b_q[:, None], BK, BV)
