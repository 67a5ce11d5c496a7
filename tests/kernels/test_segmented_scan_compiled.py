"""The kernels of a segmented scan compiled for cards that need not be there: shared memory, and no spills."""

from __future__ import annotations

from typing import Any

import pytest

from hf_gdn.kernels.triton.runtime import HAS_TRITON, INTERPRET

if INTERPRET or not HAS_TRITON:
    pytest.skip("needs Triton's compiler: the package, and no TRITON_INTERPRET", allow_module_level=True)

from hf_gdn.kernels.triton import chunk_gdn, chunk_kda, chunks, segmented_scan

from .compiled import SHARED_LIMIT, TARGETS, Compiled, compile_for

MERGE = segmented_scan.MERGE_CONFIG
# Kernel, its fp32 tensors, what only its outputs need, and [64, BK] tiles per chunk.
SCANS = {
    "gdn": (chunk_gdn._scan_kernel, ("p_kin", "p_qin", "p_kout", "p_decay"), ("p_q", "p_p", "p_qin", "p_o"), 2),
    "kda": (chunk_kda._scan_kernel, ("p_decay",), ("p_p", "p_qin", "p_o"), 3),
}
TABLES = {"p_bounds": "*i64", "p_first": "*i64", "p_long": "*i64"}
FP32 = ("p_initial", "p_states", "p_final")
# Bytes per thread that may be spilled, by kernel, target, K and V.
SPILLS = {
    # Two registers; uncut the A100's scan just fits.
    ("gdn scan", "sm_80", 128, 128): 8,
}


def compiled(kernel, name, target, K, V, fp32, constexprs, packed, **options) -> Compiled:
    shape: dict[str, Any] = dict(HK=1, HV=2, K=K, V=V, BT=chunks.CHUNK, BK=chunks.padded(K), SEGMENTS=16)
    constexprs = {**shape, **({} if packed else dict.fromkeys(TABLES)), **constexprs}
    constexprs = {n: value for n, value in constexprs.items() if n in kernel.arg_names}
    signature = {}
    for n in kernel.arg_names:
        if n not in constexprs:
            signature[n] = TABLES.get(n, "*fp32" if n in (*FP32, *fp32) else "*bf16" if n.startswith("p_") else "i32")
    divisible = [n for n in signature if n.startswith("stride_") or n == "minimum"]
    result = compile_for(kernel, signature, constexprs, target, divisible=divisible, **options)
    assert result.shared <= SHARED_LIMIT[target], result
    assert result.spills <= SPILLS.get((name, target, K, V), 0), result
    return result


def check_scan(op: str, target: str, K: int = 128, V: int = 128, states=False, packed=False) -> Compiled:
    """Compile one of the two passes over segments as it is launched on bf16 tensors on `target`."""
    kernel, fp32, outputs, key_tiles = SCANS[op]
    sizes = chunks.scan_config(1, V, chunks.padded(K), 2, SHARED_LIMIT[target], key_tiles)
    options = dict(zip(("num_warps", "num_stages"), sizes[1:], strict=True))
    constexprs = {"BV": sizes[0], "PRECISION": None, **(dict.fromkeys((*outputs, "p_final")) if states else {})}
    return compiled(kernel, f"{op} {'states' if states else 'scan'}", target, K, V, fp32, constexprs, packed, **options)


def check_merge(target: str, K: int = 128, V: int = 128, packed=False, precision: str | None = None) -> Compiled:
    BK = chunks.padded(K)
    precision = precision or ("ieee" if target.startswith("gfx") else "tf32x3")
    constexprs = {"BV": MERGE.BV, "BI": min(BK, MERGE.BI), "PRECISION": precision}
    options = {
        "num_warps": MERGE.num_warps,
        "num_stages": segmented_scan.merge_stages(BK, SHARED_LIMIT[target]),
    }
    return compiled(segmented_scan._merge_kernel, "merge", target, K, V, (), constexprs, packed, **options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("states", [True, False], ids=["states", "scan"])
@pytest.mark.parametrize("op", SCANS)
def test_passes(op, states, target):
    check_scan(op, target, states=states)


@pytest.mark.parametrize("precision", [None, "ieee"], ids=["native", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_merge(target, precision):
    check_merge(target, precision=precision)


@pytest.mark.parametrize(("K", "V"), [(64, 64), (96, 192), (256, 256)])
@pytest.mark.parametrize("target", TARGETS)
def test_merge_of_other_heads(target, K, V):
    check_merge(target, K, V)


@pytest.mark.parametrize(
    ("op", "target", "K", "V"),
    [("gdn", "sm_80", 256, 256), ("kda", "sm_100", 256, 256), ("gdn", "sm_90", 96, 192), ("kda", "gfx942", 96, 192)],
)
def test_states_of_other_heads(op, target, K, V):
    check_scan(op, target, K, V, states=True)


def test_packed():
    check_scan("gdn", "sm_90", states=True, packed=True)
    check_scan("kda", "sm_90", packed=True)
    check_merge("sm_90", packed=True)
