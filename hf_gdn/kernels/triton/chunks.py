"""Helpers of the chunked kernels: the position of a chunk, and the launch parameters of a scan over chunks.

A chunk is 64 tokens. Every packed sequence starts a new chunk, and its last chunk may be short. Programs look up their
sequence on the device, so that lengths never cause a host sync.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .runtime import NOT_MEASURED, LaunchConfig, cdiv, next_power_of_2, tl, triton

CHUNK = 64
_CHUNK = tl.constexpr(CHUNK)


@dataclass(frozen=True, kw_only=True)
class ScanConfig(LaunchConfig):
    """Launch parameters of a scan over chunks, for K up to 128 and two bytes per element.

    Args:
        min_shared: minimum shared memory per block in KiB for which this row is used.
        max_heads: maximum N * HV for which this row is used.
        BV: columns of a state per program.
    """

    min_shared: int
    max_heads: int
    BV: int


_H200 = "H200, sketches at K = V = 128: BV 32 won at 32 heads, 64 at 256 heads; more than 4 warps never helped"
SCAN_CONFIGS = (
    ScanConfig(min_shared=200, max_heads=128, BV=32, num_warps=4, measured_on=_H200),
    ScanConfig(min_shared=200, max_heads=2**31, BV=64, num_warps=4, measured_on=_H200),
    # On A100 and consumer cards, operands are in registers; wider tiles or fewer warps spill.
    ScanConfig(min_shared=80, max_heads=2**31, BV=32, num_warps=8, measured_on=NOT_MEASURED),
    # MI300: 64 KiB of shared memory, but twice the registers.
    ScanConfig(min_shared=0, max_heads=128, BV=32, num_warps=4, measured_on=NOT_MEASURED),
    ScanConfig(min_shared=0, max_heads=2**31, BV=64, num_warps=4, measured_on=NOT_MEASURED),
)


class Chunks(NamedTuple):
    """The chunks of a call, in token order.

    Args:
        programs: upper bound of the number of chunks.
        bounds: ``cu_seqlens``, or None if every sequence has T tokens.
        first: ``[N]`` index of the first chunk of every packed sequence.
        sequence: ``[programs]`` packed sequence of every chunk.
    """

    programs: int
    bounds: Tensor | None
    first: Tensor | None
    sequence: Tensor | None

    def arguments(self) -> dict[str, Tensor | None]:
        """Arguments of a kernel with one program per chunk."""
        return dict(p_bounds=self.bounds, p_first=self.first, p_sequence=self.sequence)


def chunks_of(B: int, T: int, cu_seqlens: Tensor | None) -> Chunks:
    """The chunks of B sequences of T tokens, or of the sequences that `cu_seqlens` packs into T tokens."""
    if cu_seqlens is None:
        return Chunks(B * cdiv(T, CHUNK), None, None, None)
    sequences = len(cu_seqlens) - 1
    programs = cdiv(T, CHUNK) + sequences
    counts = (cu_seqlens.diff() + (CHUNK - 1)) // CHUNK
    ends = counts.cumsum(0)
    numbers = torch.arange(programs, device=cu_seqlens.device)
    # Surplus programs are assigned to the last sequence; they start past its end and return.
    sequence = torch.searchsorted(ends, numbers, right=True).clamp_(max=sequences - 1)
    return Chunks(programs, cu_seqlens, ends - counts, sequence)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    # Read from Triton, because torch's device properties lack it on some platforms.
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory per block on `device`; practically unlimited in the interpreter."""
    return _shared_memory(device) if device.type == "cuda" else 2**20


def padded(size: int) -> int:
    """Tile size for a whole head dimension: a power of two that tensor cores support."""
    return max(16, next_power_of_2(size))


def scan_config(heads: int, V: int, BK: int, itemsize: int, shared: int, key_tiles: int) -> tuple[int, int, int]:
    """BV, number of warps and pipeline stages of a scan.

    Args:
        heads: N * HV, the number of states.
        V, BK: dimension of values; padded dimension of keys.
        itemsize: bytes per element of v.
        shared: bytes of shared memory per block.
        key_tiles: ``[64, BK]`` tiles that the scan reads per chunk.
    """
    config = next(c for c in SCAN_CONFIGS if shared >= c.min_shared * 1024 and heads <= c.max_heads)
    BV, warps = config.BV, config.num_warps
    if BK > 128 or itemsize > 2:  # twice the registers per column of the state
        BV, warps = 16, 8
    BV = min(BV, padded(V))
    stage = itemsize * CHUNK * (key_tiles * BK + BV + 2 * CHUNK)
    scratch = itemsize * BV * (BK + 2 * CHUNK)
    return BV, warps, max(1, min(3, (shared - scratch) // stage))


@triton.jit
def locate_chunk(i_chunk, p_bounds, p_first, p_sequence, T):
    """``(batch, first token, end of the sequence)`` of a chunk. For surplus programs, first token >= end."""
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
