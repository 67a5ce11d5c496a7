"""The gated delta rule over whole sequences. Token by token is faster here than chunks with BLAS, and exact.

A block of columns of the state stays in the first-level cache for 16 tokens, at 5 operations for every number of the
state and token; chunks of 64 tokens need as many, as products of small matrices. See `recurrent` for the contract and
docs/tuning.md for the measurement. The oracle is `hf_gdn.kernels.reference.delta_rule`.
"""

from __future__ import annotations

from ...registry import Kernel, register
from .recurrent import recurrent
from .runtime import why_not

register(Kernel("chunk_gdn", "numba", recurrent, why_not, fast_on=("cpu",), slots=True))
register(Kernel("chunk_kda", "numba", recurrent, why_not, fast_on=("cpu",), slots=True))
