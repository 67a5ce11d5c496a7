"""The chunk kernels compiled for cards that need not be there: shared memory within the limit, and no spills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from hf_gdn.kernels.triton.runtime import HAS_TRITON, INTERPRET

if INTERPRET or not HAS_TRITON:
    pytest.skip("needs Triton's compiler: the package, and no TRITON_INTERPRET", allow_module_level=True)

import triton.language as tl

from hf_gdn.kernels.triton import (
    chunk_gdn,
    chunk_gdn_prepare,
    chunk_kda,
    chunk_kda_prepare,
    chunk_kda_strong_decay,
    chunks,
    triangular_inverse,
)

from .compiled import SHARED_LIMIT, TARGETS, Compiled, compile_for

HK, HV = 16, 32
GDN_PREPARE, KDA_PREPARE = chunk_gdn_prepare.PREPARE_CONFIGS[torch.bfloat16], chunk_kda_prepare.PREPARE_CONFIG
KDA_SCORES, KDA_INVERSE = chunk_kda_strong_decay.SCORES_CONFIG, chunk_kda_strong_decay.INVERSE_CONFIG
# Bytes per thread that may be spilled, by kernel, target and the width of what makes it that wide (K, or BV of a scan).
SPILLS = {
    # MI300 keeps a few scalars (masks, pointers), never tiles, in spare lanes.
    ("kda scores", "gfx942", 128): 32,
    # The widest scan at 4 warps is a dozen registers over; with 8 it is none, but 4 were faster on the H200.
    ("gdn scan", "sm_90", 64): 64,
    ("gdn scan", "sm_100", 64): 128,
    ("kda scan", "sm_100", 64): 32,
    # MI300 keeps masks that do not change from head to head in spare lanes, four bytes each.
    ("gdn prepare", "gfx942", 128): 384,
    # Norms of rows and columns of three tiles, a few registers over; models come with normalised q and k.
    ("gdn prepare l2norm", "sm_90", 128): 16,
    ("gdn prepare l2norm", "sm_100", 128): 48,
    ("gdn prepare l2norm", "gfx942", 128): 384,
    # More steps over the channels, which ptxas unrolls and overlaps.
    ("gdn prepare", "sm_80", 256): 64,
    ("gdn prepare", "sm_90", 256): 16,
}


@dataclass(frozen=True)
class Launch:
    """A kernel, what its launcher gives it beside the shape, and whether it is the scan."""

    kernel: Any
    fp32: tuple[str, ...]
    constexprs: Callable[[int], dict[str, Any]]
    num_warps: Callable[[int], int] = lambda BK: 4
    num_stages: int = 2
    key_tiles: int = 0


PREPARE = Launch(
    chunk_gdn_prepare.prepare_kernel,
    ("p_g", "p_kin", "p_qin", "p_kout", "p_decay"),
    lambda BK: {
        "BC": chunk_gdn_prepare.HALF,
        "BK": min(BK, GDN_PREPARE.BK),
        "INSIDE": triangular_inverse.OPERANDS[torch.bfloat16],
        "QK_L2NORM": False,
    },
    num_warps=lambda BK: GDN_PREPARE.num_warps,
    num_stages=GDN_PREPARE.num_stages,
)
LAUNCHES = {
    "gdn prepare": PREPARE,
    "gdn prepare l2norm": replace(PREPARE, constexprs=lambda BK: {**PREPARE.constexprs(BK), "QK_L2NORM": True}),
    "gdn scan": Launch(
        chunk_gdn._scan_kernel,
        ("p_kin", "p_qin", "p_kout", "p_decay", "p_initial", "p_final"),
        lambda BK: {"BK": BK},
        key_tiles=2,
    ),
    "kda prepare": Launch(
        chunk_kda_prepare.prepare_kernel,
        ("p_g", "p_decay", "p_range", "p_norms"),
        lambda BK: {
            "BK": min(BK, KDA_PREPARE.BK),
            "INSIDE": tl.bfloat16,
            "OPERANDS": triangular_inverse.OPERANDS[torch.bfloat16],
        },
        num_warps=lambda BK: KDA_PREPARE.num_warps,
        num_stages=KDA_PREPARE.num_stages,
    ),
    "kda scores": Launch(
        chunk_kda_strong_decay.scores_kernel,
        ("p_g", "p_range", "p_n", "p_norms"),
        lambda BK: {"BK": min(BK, KDA_SCORES.BK), "BC": KDA_SCORES.BC, "INSIDE": tl.bfloat16},
        num_warps=lambda BK: KDA_SCORES.num_warps,
    ),
    "kda inverse": Launch(
        chunk_kda_strong_decay.inverse_kernel,
        ("p_g", "p_range", "p_n", "p_norms"),
        lambda BK: {"BK": min(BK, KDA_INVERSE.BK), "OPERANDS": triangular_inverse.OPERANDS[torch.bfloat16]},
        num_warps=lambda BK: KDA_INVERSE.num_warps,
    ),
    "kda scan": Launch(
        chunk_kda._scan_kernel,
        ("p_decay", "p_initial", "p_final"),
        lambda BK: {"BK": BK},
        key_tiles=3,
    ),
}


def check(
    name: str, target: str, K: int = 128, V: int = 128, heads: int = HV, packed=False, absent=(), group: int = HV // HK
) -> Compiled:
    """Compile the kernel as launched on bf16 tensors, with all optional pointers but packing's and `absent`."""
    launch = LAUNCHES[name]
    BK = chunks.padded(K)
    constexprs = {"HK": HK, "HV": HK * group, "K": K, "V": V, "BT": chunks.CHUNK, "PRECISION": None}
    constexprs["WIDEST"] = chunk_kda_prepare.WIDEST[torch.bfloat16]
    num_warps, options, width = launch.num_warps(BK), {"num_stages": launch.num_stages}, BK
    if launch.key_tiles:
        BV, num_warps, options["num_stages"] = chunks.scan_config(
            heads, V, BK, 2, SHARED_LIMIT[target], launch.key_tiles
        )
        constexprs["BV"] = width = BV
    constexprs |= launch.constexprs(BK)
    tables = {"p_bounds": "*i64", "p_first": "*i64", "p_sequence": "*i64"}
    constexprs |= dict.fromkeys((*absent, *(() if packed else tables)))
    constexprs |= {"SEGMENTS": 1, "p_states": None, "p_long": None}
    constexprs |= dict.fromkeys(("stride_gh", "stride_bh"), 1)  # Triton makes a constant of an integer that is 1
    if name.startswith("kda"):
        del constexprs["stride_gh"]
    names = launch.kernel.arg_names
    constexprs = {n: value for n, value in constexprs.items() if n in names}
    signature = {}
    for n in names:
        if n not in constexprs:
            by_name = {"scale": "fp32", **tables}
            dtype = "*fp32" if n in launch.fp32 else "*bf16" if n.startswith("p_") else "i32"
            signature[n] = by_name.get(n, dtype)
    divisible = [n for n in signature if n.startswith("stride_")]
    result = compile_for(launch.kernel, signature, constexprs, target, num_warps, divisible=divisible, **options)
    assert result.shared <= SHARED_LIMIT[target], result
    assert result.spills <= SPILLS.get((name, target, width), 0), result
    return result


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_head_128(name, target):
    check(name, target)


@pytest.mark.parametrize("target", TARGETS)
def test_one_value_head_per_key_head(target):
    assert check("gdn prepare", target, group=1).spills == 0


SCANS = [name for name, launch in LAUNCHES.items() if launch.key_tiles]


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("name", SCANS)
def test_scan_of_many_heads(name, target):
    check(name, target, heads=256)


# Each kernel once at every other size, the targets in turn; on the tightest ones where it is the tile that grows.
@pytest.mark.parametrize(
    ("name", "target", "K", "V"),
    [
        ("gdn prepare", "sm_80", 256, 256),
        ("gdn prepare", "sm_90", 256, 256),
        ("gdn prepare", "sm_100", 96, 192),
        ("gdn prepare l2norm", "sm_80", 16, 16),
        *(("kda prepare", target, 256, 256) for target in TARGETS),
        ("kda prepare", "sm_100", 96, 192),
        ("kda scores", "sm_90", 256, 256),
        ("kda inverse", "sm_80", 256, 256),
        *(("kda scan", target, 256, 256) for target in TARGETS),
        ("gdn scan", "sm_80", 256, 256),
        ("gdn scan", "gfx942", 256, 256),
        ("gdn scan", "sm_80", 96, 192),
        ("kda scan", "sm_90", 96, 192),
    ],
)
def test_other_heads(name, target, K, V):
    check(name, target, K, V)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("K", [128, 256])
def test_kda_preparation_of_what_is_normalised_already(target, K):
    """As models call it: their prologue normalises."""
    check("kda prepare", target, K, absent=["p_norms"])


@pytest.mark.parametrize("name", ["gdn prepare", "kda prepare", "kda scores", "kda inverse", "kda scan"])
def test_packed(name):
    check(name, "sm_90", packed=True)
