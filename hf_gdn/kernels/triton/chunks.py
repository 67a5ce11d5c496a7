"""What the chunked kernels share: where a chunk lies, products, the shape of a launch.

A chunk is 64 tokens. In packed sequences every sequence starts a chunk of its own, and its last one may be short;
which sequence a program serves is looked up on the device, so that no length ever has to come back to the host.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .runtime import INTERPRET, tl, triton

CHUNK = 64
_INTERPRETED = tl.constexpr(INTERPRET)
_CHUNK = tl.constexpr(CHUNK)
LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp several

# Scans by shared memory of a block in KiB, at least: (up to so many heads in the batch, BV, warps).
_SCAN = {
    # H200, MEASURED sketches at K = V = 128: BV 32 won at 32 heads, 64 at 256 heads; more than 4 warps never helped.
    200: ((128, 32, 4), (2**31, 64, 4)),
    # Not timed. Operands lie in registers on these cards (A100 and consumer cards); wider tiles or fewer warps spill.
    80: ((2**31, 32, 8),),
    # Not timed. MI300: 64 KiB, but twice the registers.
    0: ((128, 32, 4), (2**31, 64, 4)),
}


class Chunks(NamedTuple):
    """The chunks of a call, in the order of their tokens.

    Args:
        programs: how many there are at most.
        bounds: ``cu_seqlens``, or None when every sequence has T tokens.
        first: ``[N]`` number of the first chunk of every packed sequence.
        sequence: ``[programs]`` packed sequence of every chunk.
    """

    programs: int
    bounds: Tensor | None
    first: Tensor | None
    sequence: Tensor | None

    def arguments(self) -> dict[str, Tensor | None]:
        """Arguments of a kernel whose programs each serve a chunk."""
        return dict(p_bounds=self.bounds, p_first=self.first, p_sequence=self.sequence)


def chunks_of(B: int, T: int, cu_seqlens: Tensor | None) -> Chunks:
    """The chunks of B sequences of T tokens, or of T tokens packed as `cu_seqlens` says."""
    if cu_seqlens is None:
        return Chunks(B * triton.cdiv(T, CHUNK), None, None, None)
    sequences = len(cu_seqlens) - 1
    programs = triton.cdiv(T, CHUNK) + sequences
    counts = (cu_seqlens.diff() + (CHUNK - 1)) // CHUNK
    ends = counts.cumsum(0)
    numbers = torch.arange(programs, device=cu_seqlens.device)
    # A program too many is given to the last sequence, finds itself past its end and leaves.
    sequence = torch.searchsorted(ends, numbers, right=True).clamp_(max=sequences - 1)
    return Chunks(programs, cu_seqlens, ends - counts, sequence)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    # Asked of Triton, since torch's properties do not name it on every platform.
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on `device`; in the interpreter no limit matters."""
    return _shared_memory(device) if device.type == "cuda" else 2**20


def input_precision(dtype: torch.dtype) -> str | None:
    """How fp32 operands are multiplied: exactly for fp32 inputs, else as the target's tensor cores take them."""
    return "ieee" if dtype == torch.float32 else None


def padded(size: int) -> int:
    """Tile that holds a whole head dimension: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(size))


def scan_options(heads: int, V: int, BK: int, itemsize: int, shared: int, key_tiles: int) -> tuple[int, int, int]:
    """BV, warps and stages of a scan.

    Args:
        heads: N * HV, the states that are carried.
        V, BK: values per head; keys per head, padded.
        itemsize: bytes per element of v.
        shared: bytes of shared memory per block.
        key_tiles: ``[64, BK]`` tiles that the scan reads per chunk.
    """
    table = next(table for limit, table in _SCAN.items() if shared >= limit * 1024)
    BV, warps = next(row[1:] for row in table if heads <= row[0])
    if BK > 128 or itemsize > 2:  # twice the registers per column of the state
        BV, warps = 16, 8
    BV = min(BV, padded(V))
    stage = itemsize * CHUNK * (key_tiles * BK + BV + 2 * CHUNK)
    scratch = itemsize * BV * (BK + 2 * CHUNK)
    return BV, warps, max(1, min(3, (shared - scratch) // stage))


@triton.jit
def dot(b_x, b_y, b_acc=None, PRECISION: tl.constexpr = None):
    """b_acc + b_x @ b_y in fp32."""
    if _INTERPRETED:  # the interpreter takes bf16 operands for integers
        b_x = b_x.to(tl.float32)
        b_y = b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_acc, input_precision=PRECISION)


@triton.jit
def locate_chunk(i_chunk, p_bounds, p_first, p_sequence, T):
    """``(batch, first token, end of the sequence)`` of a chunk; at or past the end when the program is one too many."""
    if p_bounds is not None:
        i_n = tl.load(p_sequence + i_chunk)
        i_b = i_chunk * 0
        i_t = tl.load(p_bounds + i_n).to(tl.int64) + (i_chunk - tl.load(p_first + i_n)) * _CHUNK
        end = tl.load(p_bounds + i_n + 1).to(tl.int64)
    else:
        i_b = i_chunk // tl.cdiv(T, _CHUNK)
        i_t = i_chunk % tl.cdiv(T, _CHUNK) * _CHUNK
        end = i_b * 0 + T
    return i_b, i_t, end


@triton.jit
def locate_sequence(i_n, p_bounds, p_first, T):
    """``(batch, first token, end, first chunk)`` of a sequence."""
    if p_bounds is not None:
        i_b = i_n * 0
        i_t = tl.load(p_bounds + i_n).to(tl.int64)
        end = tl.load(p_bounds + i_n + 1).to(tl.int64)
        i_chunk = tl.load(p_first + i_n)
    else:
        i_b = i_n
        i_t = i_n * 0
        end = i_n * 0 + T
        i_chunk = i_n * tl.cdiv(T, _CHUNK)
    return i_b, i_t, end, i_chunk
