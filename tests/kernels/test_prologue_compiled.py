"""Prologue and gated norm compiled for cards that need not be there: no spills, shared memory within the limit."""

import pytest

from hf_gdn.kernels.triton.runtime import HAS_TRITON, INTERPRET

if INTERPRET or not HAS_TRITON:
    pytest.skip("needs Triton's compiler: the package, and no TRITON_INTERPRET", allow_module_level=True)

import triton

from hf_gdn.kernels.triton import gated_norm
from hf_gdn.kernels.triton import prologue as module

from .compiled import TARGETS, Compiled, check, compile_for

RULES = pytest.mark.parametrize("is_kda", [False, True], ids=["gdn", "kda"])
TABLES = {"p_bounds": "*i64", "p_first": "*i64", "p_sequence": "*i64", "p_lengths": "*i64"}
FP32 = ("p_A_log", "p_og", "p_obeta")


def prologue(target, is_kda, K=128, V=128, width=4, bias=False, tables=()) -> Compiled:
    """The kernel as launched on bf16 tensors and parameters, with a cache."""
    kernel = module._prologue_kernel
    BK, BV = triton.next_power_of_2(K), triton.next_power_of_2(V)
    config = module.prologue_config(BK, BV)
    constexprs = dict(
        HK=32 if is_kda else 16, HV=32, K=K, V=V, BT=config.BT, BK=BK, BV=BV, WIDTH=width, KEEP=width,
        BW=triton.next_power_of_2(width), CHUNK=module.CHUNK, LOWER_BOUND=None, IS_KDA=is_kda, DECAY_IN_DTYPE=False,
    )  # fmt: skip
    constexprs |= {name: None for name in TABLES if name not in tables}
    if not bias:
        constexprs["p_bias"] = None
    strides = [name for name in kernel.arg_names if name.startswith("stride_")]
    signature = {name: "*fp32" if name in FP32 else "*bf16" for name in kernel.arg_names if name.startswith("p_")}
    signature |= dict.fromkeys(strides, "i32") | {"T": "i32", "beta_scale": "fp32"} | TABLES
    signature = {name: kind for name, kind in signature.items() if name not in constexprs}
    divisible = [name for name in strides if name[-2] in "qkv" or (is_kda and name[-2] == "a")]
    return compile_for(kernel, signature, constexprs, target, config.num_warps, divisible=divisible)


@pytest.mark.parametrize("target", TARGETS)
@RULES
def test_prologue(target, is_kda):
    check(prologue(target, is_kda))


@pytest.mark.parametrize(
    ("target", "is_kda", "K", "V"),
    [("sm_80", True, 256, 256), ("sm_90", False, 96, 192), ("gfx942", True, 256, 256), ("sm_100", True, 64, 64)],
)
def test_prologue_of_other_heads(target, is_kda, K, V):
    check(prologue(target, is_kda, K, V, bias=True))


@RULES
def test_prologue_of_packed_and_padded_rows(is_kda):
    check(prologue("sm_90", is_kda, tables=("p_bounds", "p_first", "p_sequence")))
    check(prologue("sm_90", is_kda, width=8, tables=("p_lengths",)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("V", [128, 256])
def test_gated_norm(target, V):
    kernel, config = gated_norm._gated_norm_kernel, gated_norm.GATED_NORM_CONFIG
    strides = [name for name in kernel.arg_names if name.startswith("stride_")]
    signature = {name: "*bf16" for name in kernel.arg_names if name.startswith("p_")}
    signature |= dict.fromkeys(strides, "i32") | {"rows": "i32", "T": "i32", "eps": "fp32"}
    constexprs = dict(HV=32, R=2, V=V, BR=config.elements // V, BV=V, NORM_IN_FP32=False, GATE_IS_SILU=True)
    check(compile_for(kernel, signature, constexprs, target, config.num_warps, divisible=strides))
