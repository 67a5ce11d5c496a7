"""Useful work of a call, and what this machine can do at most.

Useful work is the algorithm's, not the implementation's, so that backends compare: `flops` and `moved_bytes` say how it
is counted.
"""

from __future__ import annotations

import torch

from .kernel_results import Ceilings
from .timing import times

CHUNK = 64


def flops(
    op: str, *, batch: int, tokens: int, k_heads: int, v_heads: int, k_dim: int, v_dim: int, backward: bool = False
) -> int:
    """Floating-point operations of a call.

    A product of ``[m, k]`` and ``[k, n]`` counts 2mkn, tiles of C = 64 tokens whole, as matrix units compute them.

    Chunked, per token (docs/delta_rule.md, "Chunks"):

        K Kᵀ and Q Kᵀ                              4 C K    a key head; a value head where each has its own decays (KDA)
        (e^G∘K) S and (e^G∘Q) S                    4 K V    a value head
        (I + A)⁻¹ diag(β) times its right side     2 C V    a value head
        P U                                        2 C V    a value head
        (e^(G_C - G)∘K)ᵀ U                         2 K V    a value head

    The inverse, C²/3 a token by substitution, and what is elementwise are left out: about 1 % at K = V = 128.

    Recurrent, per token and value head: what the state answers to k and to q, 2 K V each, and its decay, the outer
    product and their sum, 3 K V: 7 K V.

    Forward and backward is 3 times the forward: the gradients of a product are two products of its size. What an
    implementation computes a second time in its backward does not count.
    """
    if op.startswith("recurrent"):
        token = 7 * v_heads * k_dim * v_dim
    else:
        scored = v_heads if op.endswith("kda") else k_heads
        token = 4 * CHUNK * k_dim * scored + (4 * CHUNK * v_dim + 6 * k_dim * v_dim) * v_heads
    return batch * tokens * token * (3 if backward else 1)


def moved_bytes(
    op: str,
    *,
    batch: int,
    tokens: int,
    k_heads: int,
    v_heads: int,
    k_dim: int,
    v_dim: int,
    itemsize: int,
    backward: bool = False,
) -> int:
    """Bytes that a call has to read and write: every input once, every output once.

    Per token, with e bytes for an element of q, k, v, beta and o, and 4 for one of g:

        in   e (2 K) a key head, e (V + 1) + 4 (1, or K for KDA) a value head;  out   e V a value head

    and once per sequence and value head the state of 4 K V bytes, read and written.

    Forward and backward is 3 in + 2 out: the forward's in + out, then inputs and the gradients of the outputs are read
    and the gradients of the inputs written. What an implementation keeps for its backward does not count.
    """
    decays = k_dim if op.endswith("kda") else 1
    state = batch * v_heads * 4 * k_dim * v_dim
    read = itemsize * 2 * k_dim * k_heads + (itemsize * (v_dim + 1) + 4 * decays) * v_heads
    read, written = batch * tokens * read + state, batch * tokens * itemsize * v_dim * v_heads + state
    return 3 * read + 2 * written if backward else read + written


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What this machine can do at most, the best of a few runs each.

    Returns:
        ``copy_gb_s``: GB/s of a copy, read and write counted, 1 GiB to 1 GiB (256 MiB on a CPU), beyond its caches.
        ``matmul_tflop_s``: TFLOP/s of n x n matrix products of `dtype`, or of float32 where those are faster, since a
        kernel may compute in either; n the power of two from 256 to 8192 that does best, none larger than the first
        that takes 10 ms.
    """
    with torch.inference_mode():
        rates = [_matmul(device, used) for used in {dtype, torch.float32}]
        return Ceilings(copy_gb_s=_copy(device), matmul_tflop_s=max(rates))


def _copy(device: torch.device) -> float:
    source = torch.ones(2**26 if device.type == "cpu" else 2**28, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    return 2 * source.nbytes / min(times(lambda: copy.copy_(source), 0.2, device)) / 1e6


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    best, n, ms = 0.0, 256, 0.0
    while n <= 8192 and ms < 10:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        ms = min(times(lambda a=a, b=b: a @ b, 0.05, device))  # type: ignore[misc]
        best = max(best, 2 * n**3 / ms / 1e9)
        n *= 2
    return best
