"""What the kernels that go token by token share: the rule for one token, and how the state is divided.

A program owns BV columns of a state [K, V], which do not interact, and keeps them in registers over all tokens.

Bits do not depend on the batch, the tile or how tokens are divided among calls: every sum over K is the same binary
tree whichever threads hold the rows (`sum_rows`), and a product is fused into an addition only where the code says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from .math import sum_rows
from .runtime import LaunchConfig, tl, triton

# Which products the compiler would fuse into additions depends on the tile, and with it the bits.
FP_FUSION = False


@dataclass(frozen=True, kw_only=True)
class TokenConfig(LaunchConfig):
    """Launch of a kernel that goes token by token, at K up to 128.

    Args:
        max_heads: N * HV up to which this row serves.
        BV: columns of a state per program.
    """

    max_heads: int
    BV: int


_MEASURED_ON = "H200, a sketch of the recurrent kernel: T = 1, K = V = 128, 32 heads, batches of 1, 8, 32, 128 and 256"
# Few heads need many programs, many heads need wide rows.
TOKEN_CONFIGS = (
    TokenConfig(max_heads=512, BV=16, num_warps=1, measured_on=_MEASURED_ON),
    TokenConfig(max_heads=2048, BV=32, num_warps=2, measured_on=_MEASURED_ON),
    TokenConfig(max_heads=2**31, BV=64, num_warps=4, measured_on=_MEASURED_ON),
)


def tile_config(heads: int, K: int, V: int) -> tuple[int, int]:
    """BV and the number of warps for `heads` = N * HV states of shape [K, V]."""
    config = next(config for config in TOKEN_CONFIGS if heads <= config.max_heads)
    # Beyond K = 128 half the columns, which is as many state values per thread as at 128.
    BV = config.BV if K <= 128 else config.BV // 2
    return min(BV, triton.next_power_of_2(V)), config.num_warps


@triton.jit
def delta_rule_token(b_s, b_q, b_k, b_v, b_decay, b_beta, scale, BK: tl.constexpr, BV: tl.constexpr):
    """The delta rule for one token: the state ``[BK, BV]`` and o ``[BV]``. The decay is a number or ``[BK, 1]``."""
    b_s *= b_decay
    b_u = b_beta * (b_v - sum_rows(b_s * b_k[:, None], BK, BV))
    # Fused by hand, in every tile: it saves registers, without which some tiles spill.
    b_s = tl.fma(b_k[:, None], b_u[None, :], b_s)
    return b_s, scale * sum_rows(b_s * b_q[:, None], BK, BV)
